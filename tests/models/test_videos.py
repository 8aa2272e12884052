"""The diffusion transformer on videos and volumes: attention over frames, positions, pairs of blocks, one frame."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diversedit_jax import models, sharding
from diversedit_jax.api import Conditions, Model, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, dit
from diversedit_jax.models.dit import SKIPS, Block
from diversedit_jax.models.patches import patchify, position_table, unpatchify
from tests.models.test_dit import assert_close

FRAMES, SHAPE, CLASSES, WIDTH, HEADS, BATCH = 3, (3, 4, 8, 2), 5, 24, 2, 2
SPACE = Space(SHAPE, Conditions.labels(CLASSES), video=True)
PLACES = 2 * 4  # patches of a frame
LABELS, TIMES = jnp.array([0, CLASSES]), jnp.array([0.2, 0.7])
RNGS = Keys(jax.random.key(0))
DEPTH = 8


def make(space: Space = SPACE, read_blocks=(), **options) -> Model:
    given = {"depth": DEPTH, "width": WIDTH, "heads": HEADS, "mlp_ratio": 2.0} | options
    return models.make("dit", space, {}, read_blocks, **given)


def drawn(shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, *shape))


def trained(model: Model):
    """Parameters none of which is zero. A product keeps the length of a token, so that rounding does not grow."""
    abstract, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(WIDTH**-0.5 * rng.standard_normal(p.shape), p.dtype), abstract)


def run(model: Model, params, x, t=TIMES, y=LABELS):
    return jax.jit(model.apply)(params, x, t, y)


# --- Factorised attention equals attention among all tokens with a mask.


def seen(across: bool) -> np.ndarray:
    """Which tokens see which, [n n]."""
    frame, place = np.divmod(np.arange(FRAMES * PLACES), PLACES)
    axis = place if across else frame
    return axis[:, None] == axis


def masked(q, k, v, mask):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def in_a_row(params, x_t, *, skip: str, pairing: str):
    """The same network, one block after another, with masks and with the pairs written out."""
    form, half = SKIPS[skip], DEPTH // 2
    partners = {"mirror": {4: 3, 5: 2, 6: 1, 7: 0}, "same_kind": {4: 2, 5: 3, 6: 0, 7: 1}}[pairing]

    def module(build, params, i):
        return nnx.merge(nnx.graphdef(nnx.eval_shape(build)), jax.tree.map(lambda p: p[i], params))

    def block(i, x, c):
        stack, j = (params["shallow"], i) if i < half else (params["deep"], i - half)
        one = module(lambda: Block(WIDTH, HEADS, 2.0, "none", jnp.dtype("float32"), rngs=RNGS), stack, j)
        ada = one.modulation(c)
        return one.after(x, masked(*one.heads(x, ada), seen(across=i % 2 == 1)), ada)

    def merge(i, x, skip):
        build = dit.merging(form, WIDTH, jnp.dtype("float32"))
        return module(lambda: build(rngs=RNGS), params["merges"], i - half)(x, skip)

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    frame, time = position_table((2, 4), WIDTH), position_table((FRAMES,), WIDTH)
    table = np.concatenate([frame + time[k] - time[0] for k in range(FRAMES)])
    x = linear(params["patch_embed"], patchify(x_t, (1, 2, 2))) + table
    angles = TIMES[:, None] * 10000.0 ** -(np.arange(128) / 128)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    c = linear(params["time_embed"]["fc2"], jax.nn.silu(linear(params["time_embed"]["fc1"], waves)))
    c = c + params["label_embed"]["embedding"][LABELS]
    features, outputs = [x], []
    for i in range(DEPTH):
        pair = form is not None and i >= half
        if pair and form.merge == "pre":
            x = merge(i, x, outputs[partners[i]])
        x = block(i, x, c)
        if pair and form.merge == "post":
            x = merge(i, x, outputs[partners[i]])
        outputs.append(x)
        features.append(x)
    shift, scale = jnp.split(linear(params["final_ada"], jax.nn.silu(c)), 2, axis=1)
    out = linear(params["final"], dit.modulate(x, shift, scale))
    return unpatchify(out, SHAPE, (1, 2, 2)), tuple(features)


def objective(apply):
    """A loss that reads the prediction and every feature, each with its own random weights."""

    def loss(params):
        out, features = apply(params)
        keys = jax.random.split(jax.random.key(7), len(features) + 1)
        terms = [jnp.vdot(jax.random.normal(k, f.shape), f) for k, f in zip(keys, (out, *features), strict=True)]
        return sum(terms) / len(terms), (out, features)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@cache
def of_the_loop(skip: str, pairing: str):
    params = trained(make(attention_axes="factorised", skip=skip, pairing=pairing))
    return jax.device_get(objective(partial(in_a_row, x_t=drawn(), skip=skip, pairing=pairing))(params))


FIRST = ("release", "same_kind", (3,), False)
EVERY = [("none", "mirror", (), False), ("none", "mirror", (2, 5), True)]
EVERY += list(product(("release", "paper", "gate"), ("mirror", "same_kind"), ((), (1, 4, 6)), (False, True)))


@pytest.mark.parametrize(
    ("skip", "pairing", "read_blocks", "unroll"), [FIRST, *(pytest.param(*c, marks=pytest.mark.slow) for c in EVERY)]
)
def test_factorised_attention_is_a_mask(skip, pairing, read_blocks, unroll):
    options = {"attention_axes": "factorised", "skip": skip, "pairing": pairing, "unroll": unroll}
    model = make(read_blocks=read_blocks, **options)
    params = trained(model)
    (_, found), gradient = objective(lambda p: model.apply(p, drawn(), TIMES, LABELS))(params)
    (_, wanted), wanted_gradient = of_the_loop(skip, pairing)
    assert_close(found, wanted, "outputs")
    assert_close(gradient, wanted_gradient, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full", "none"])
@pytest.mark.parametrize("skip", ["none", "release"])
def test_rematerialised_it_is_the_same(remat, skip):
    model = make(read_blocks=(5,), attention_axes="factorised", skip=skip, remat=remat)
    (_, found), gradient = objective(lambda p: model.apply(p, drawn(), TIMES, LABELS))(trained(model))
    (_, wanted), wanted_gradient = of_the_loop(skip, "mirror")
    assert_close(found, wanted, "outputs")
    assert_close(gradient, wanted_gradient, "gradient")


# --- Which blocks are joined.


def test_skips_name_the_blocks_that_are_joined():
    """Each connection is cut alone, and the block that changes first is the second of its pair."""
    for pairing in ("mirror", "same_kind"):
        model = make(attention_axes="factorised", skip="paper", pairing=pairing)
        params, count = trained(model), DEPTH // 2
        pairs = np.array(model.skips.pairs)
        assert sorted(pairs.ravel()) == list(range(1, DEPTH + 1))
        if pairing == "mirror":
            assert (pairs.sum(axis=1) == DEPTH + 1).all()
        else:
            assert (pairs[:, 0] % 2 == pairs[:, 1] % 2).all()
        whole = np.stack(run(model, params, drawn())[1])
        for i, (source, target) in enumerate(pairs):
            keep = jnp.ones(count).at[i].set(0)
            cut = np.stack(run(model, model.skips.cut(params, keep), drawn())[1])
            changed = [k for k in range(DEPTH + 1) if not np.array_equal(cut[k], whole[k])]
            assert changed[0] == target, (pairing, source, target)


# --- Frames.


@pytest.mark.parametrize("skip", ["none", "release"])
def test_a_video_of_one_frame_is_the_image(skip):
    shape = SHAPE[1:]
    image = make(Space(shape, Conditions.labels(CLASSES)), skip=skip)
    params, x = trained(image), drawn(shape)
    out, features = run(image, params, x)
    for positions in ("frames", "space"):
        video = make(Space((1, *shape), Conditions.labels(CLASSES), video=True), skip=skip, positions=positions)
        found, seen = run(video, params, x[:, None])
        np.testing.assert_array_equal(found[:, 0], out)
        np.testing.assert_array_equal(seen, features)


@pytest.mark.parametrize("axes", ["joint", "factorised"])
def test_without_positions_of_frames_their_order_does_not_matter(axes):
    order = np.array([2, 0, 1])

    def moved(positions: str) -> tuple[float, float]:
        model = make(attention_axes=axes, positions=positions, skip="release", pairing="mirror")
        params, x = trained(model), drawn()
        params |= {name: tree for name, tree in params.items() if name != "frame_positions"}
        out, features = run(model, params, x)
        found, permuted = run(model, params, x[:, order])
        features, permuted = (np.stack(f).reshape(-1, BATCH, FRAMES, PLACES, WIDTH) for f in (features, permuted))
        scale = np.abs(features).max(axis=(1, 2, 3, 4), keepdims=True)
        return (
            float(np.abs((permuted - features[:, :, order]) / scale).max()),
            float(np.abs(found - out[:, order]).max() / np.abs(out).max()),
        )

    assert max(moved("space")) < 2e-5
    assert min(moved("frames")) > 1e-2
    assert min(moved("learned_frames")) > 1e-2  # their parameters are not zero here


def test_learned_positions_of_frames_begin_at_zero():
    networks = {positions: make(positions=positions) for positions in ("learned_frames", "space")}
    params = jax.jit(networks["learned_frames"].init)(jax.random.key(0))
    assert params["frame_positions"].shape == (FRAMES, WIDTH)
    given = trained(networks["space"])
    x = drawn()
    out, _ = run(networks["space"], given, x)
    found, _ = run(networks["learned_frames"], given | {"frame_positions": params["frame_positions"]}, x)
    np.testing.assert_array_equal(found, out)


def test_attention_within_frames_does_not_mix_them():
    """Block 1 sees its own frame alone, block 2 its own place alone."""
    model = make(attention_axes="factorised")
    params, x = trained(model), drawn()

    def changed(features, others):
        differs = np.stack([np.abs(a - b).max(axis=(0, 2)) > 0 for a, b in zip(features, others, strict=True)])
        return differs.reshape(-1, FRAMES, PLACES)

    _, before = run(model, params, x)
    _, after = run(model, params, x.at[:, 1, :2, :2].add(1.0))  # one patch of frame 1
    embedding, first, second, third = changed(before, after)[:4]
    assert embedding.sum() == 1
    assert first[1].all()
    assert first.sum() == PLACES
    assert second.all()  # each place of frame 1 passes it on to all frames
    assert third.all()


def test_patches_of_several_frames():
    shape = (4, 4, 8, 2)
    space = Space(shape, Conditions.labels(CLASSES), video=True)
    model = make(space, patch_frames=2, attention_axes="factorised")
    assert model.grid == (2, 2, 4)
    x = drawn(shape)
    patches = patchify(x, (2, 2, 2))
    np.testing.assert_array_equal(patches[1, 8 + 5].reshape(2, 2, 2, 2), x[1, 2:4, 2:4, 2:4])
    out, features = run(model, trained(model), x)
    assert out.shape == x.shape
    assert features[0].shape == (BATCH, 16, WIDTH)


def test_a_volume_has_positions_by_axes():
    table = position_table((2, 3, 4), 12)
    for place, row in zip(np.ndindex(2, 3, 4), table, strict=True):
        wanted = [f(i / 10000 ** (k / 2)) for i in reversed(place) for f in (np.sin, np.cos) for k in range(2)]
        np.testing.assert_allclose(row, wanted, atol=1e-6)
    model = make(Space((4, 4, 4, 1), Conditions.labels(CLASSES)))
    assert model.grid == (2, 2, 2)
    assert run(model, trained(model), drawn((4, 4, 4, 1)))[0].shape == (BATCH, 4, 4, 4, 1)


def test_one_device_and_eight_agree():
    model = make(attention_axes="factorised", skip="release", pairing="same_kind")
    params, x = trained(model), jax.random.normal(jax.random.key(1), (8, *SHAPE))
    t, y = jnp.linspace(0.1, 0.9, 8), jnp.arange(8) % CLASSES

    def found(layout):
        placed = sharding.put(params, sharding.shardings(params, layout.with_rules(model.rules)))
        batch = sharding.put({"x": x, "t": t, "y": y}, sharding.over_batch(layout))
        with jax.set_mesh(layout.mesh):
            return jax.device_get(jax.jit(model.apply)(placed, batch["x"], batch["t"], batch["y"]))

    one, eight = found(sharding.make(devices=jax.devices()[:1])), found(sharding.make(data=2, fsdp=2, tensor=2))
    assert_close(eight, one, "outputs")


# --- Errors.

IMAGE = Space((4, 8, 2), Conditions.labels(CLASSES))
VOLUME = Space((4, 4, 4, 2), Conditions.labels(CLASSES))


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (VOLUME, {"attention_axes": "factorised"}, r"factorised' is for videos, and the examples of these data are"),
        (SPACE, {"attention_axes": "factorised", "depth": 6}, r"needs a depth that is a multiple of 4, given 6"),
        (SPACE, {"attention_axes": "axial"}, r"model.attention_axes = 'axial' is unknown; .*joint, factorised"),
        (SPACE, {"pairing": "same_kind"}, r"'same_kind' needs model.skip and model.attention_axes = 'factorised'"),
        (SPACE, {"pairing": "near", "skip": "release"}, r"model.pairing = 'near' is unknown; .*mirror, same_kind"),
        (SPACE, {"positions": "rope"}, r"model.positions = 'rope' is unknown; .*auto, axes, frames"),
        (IMAGE, {"positions": "frames"}, r"model.positions = 'frames' is for videos"),
        (IMAGE, {"patch_frames": 2}, r"model.patch_frames = 2 is for videos"),
        (SPACE, {"patch_frames": 2}, r"patches of 2 x 2 x 2 do not divide examples of 3 x 4 x 8"),
        (SPACE, {"patch_frames": 0}, r"model.patch_frames = 0: must be at least 1"),
        (VOLUME, {"width": 8}, r"model.width = 8: the position table needs a multiple of 6"),
    ],
)
def test_errors(space, options, message):
    with pytest.raises(ConfigError, match=message):
        make(space, **options)

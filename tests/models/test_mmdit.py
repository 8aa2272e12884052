"""MMDiT beside an independent loop over its blocks: connections of both streams, loops, remat, devices."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, sharding
from diversedit_jax.api import Conditions, Features, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import patches
from diversedit_jax.models.dit import SKIPS
from diversedit_jax.sharding import by_name
from tests.models.test_dit import first_and_slow

SHAPE, WIDTH, HEADS, TOKENS, TEXT, BATCH = (8, 4, 2), 16, 2, 5, 6, 2
CONTEXT = {"context": np.zeros((TOKENS, TEXT), np.float32)}


def make(read_blocks=(), null=CONTEXT, **options):
    dims = {"depth": 5, "width": WIDTH, "heads": HEADS, "mlp_ratio": 2.0, "table": 6} | options
    return models.make("mmdit", Space(SHAPE, Conditions(null)), {}, read_blocks, **dims)


def inputs(b=BATCH):
    keys = jax.random.split(jax.random.key(3), 2)
    y = {"context": jax.random.normal(keys[0], (b, TOKENS, TEXT))}
    return jax.random.normal(keys[1], (b, *SHAPE)), jnp.linspace(0.2, 0.9, b), y


def trained(model):
    """Parameters without a zero, so that every part of the network counts."""
    params = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape) * leaf.shape[-1] ** -0.5
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten(drawn)


def loop(params, x_t, t, y, *, depth: int, skip: str, both: bool, capture: str = "merged"):
    """The same network, by the formulas and one block after another."""
    form, half = SKIPS[skip], depth // 2

    def linear(p, x):
        return jnp.tensordot(x, p["kernel"], 1) + p["bias"]

    def norm(x):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)

    def heads(p, x, shift, scale):
        return jnp.moveaxis(linear(p["qkv"], norm(x) * (1 + scale) + shift), 2, 0)

    def rest(p, x, out, gate, shift, scale, gate_m):
        x = x + gate * linear(p["proj"], out.reshape(x.shape))
        hidden = jax.nn.gelu(linear(p["fc1"], norm(x) * (1 + scale) + shift), approximate=True)
        return x + gate_m * linear(p["fc2"], hidden)

    def block(i, x, text):
        names = [("shallow", i), ("deep", i - half)][i >= half] if i < depth - 1 else ("last", None)
        p = params[names[0]] if names[1] is None else jax.tree.map(lambda leaf: leaf[names[1]], params[names[0]])
        ada, ada_text = (
            jnp.split(linear(p[stream]["ada"], jax.nn.silu(c))[:, None], parts, axis=-1)
            for stream, parts in (("image", 6), ("text", 6 if i < depth - 1 else 2))
        )
        q, k, v = jnp.concatenate([heads(p["text"], text, *ada_text[:2]), heads(p["image"], x, *ada[:2])], axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = rest(p["image"], x, out[:, TOKENS:], *ada[2:])
        return x, rest(p["text"], text, out[:, :TOKENS], *ada_text[2:]) if i < depth - 1 else None

    def merged(name, k, x, skip):
        p = jax.tree.map(lambda leaf: leaf[k], params[name])
        if "gate" in p:
            return x + p["gate"] * skip
        both = jnp.concatenate([x, skip], axis=-1)
        both = norm(both) * p["norm"]["scale"] + p["norm"]["bias"] if form.norm else both
        return linear(p["linear"], both)

    x = linear(params["patch_embed"], patches.patchify(x_t, (2, 2)))
    table = patches.position_table((6, 6), WIDTH).reshape(6, 6, WIDTH)[1:5, 2:4].reshape(-1, WIDTH)
    x, text = x + table, linear(params["text_embed"], y["context"])
    angles = t[:, None] * 10000.0 ** -(np.arange(128) / 128)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    c = linear(params["time_embed"]["fc2"], jax.nn.silu(linear(params["time_embed"]["fc1"], waves)))
    streams, seen = [(x, text)], [(x, text)]
    for i in range(depth):
        partner = depth - 1 - i
        pair = form is not None and partner < i
        k = half - 1 - partner

        def merge(x, text, pair=pair, k=k, partner=partner):
            if not pair:
                return x, text
            x = merged("merges", k, x, streams[partner + 1][0])
            return x, merged("text_merges", k, text, streams[partner + 1][1]) if both and text is not None else text

        if form and form.merge == "pre":
            before = after = block(i, *merge(*streams[-1]))
        else:
            before = block(i, *streams[-1])
            after = merge(*before)
        streams.append(after)
        seen.append(before if capture == "block" else after)
    shift, scale = jnp.split(linear(params["final_ada"], jax.nn.silu(c))[:, None], 2, axis=-1)
    out = patches.unpatchify(linear(params["final"], norm(streams[-1][0]) * (1 + scale) + shift), SHAPE, (2, 2))
    return out, Features([x for x, _ in seen], [text for _, text in seen[:-1]])


def objective(apply):
    def loss(params):
        out, features = apply(params, *inputs())
        read = sum(jnp.sin(f).mean() * (k + 1) for k, f in enumerate([*features, *features.text]))
        return jnp.mean(out**2) + read, (out, features)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_close(found, wanted, tolerance=2e-5):
    def compare(path, a, b):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, found, wanted)


CASES = [(skip, depth, both) for skip in SKIPS for depth in (2, 3, 4, 5) for both in (False, True)]
CASES = [case for case in CASES if case[0] != "none" or not case[2]]
CHOSEN = [("release", 5, True), ("paper", 2, True)]


@pytest.mark.parametrize(("skip", "depth", "both"), first_and_slow(CHOSEN, CASES))
def test_it_equals_a_loop_over_the_formulas(skip, depth, both):
    streams = {"skip_streams": "both"} if both else {}
    model = make(skip=skip, depth=depth, **streams)
    params = trained(model)
    (_, (out, features)), gradient = objective(model.apply)(params)
    wanted = objective(lambda *given: loop(*given, depth=depth, skip=skip, both=both))(params)
    assert (len(features), len(features.text)) == (depth + 1, depth)
    assert_close((out, features), wanted[0][1])
    assert_close(gradient, wanted[1])


OPTIONS = [{"unroll": True}, {"remat": "full"}, {"remat": "none"}, {"remat": "dots", "unroll": True}]
OPTIONS += [{"read_blocks": (1, 4), "remat": "full"}, {"read_blocks": (0, 2, 5)}]


@pytest.mark.parametrize(
    "options", [OPTIONS[-2], *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS if o != OPTIONS[-2])]
)
def test_loops_and_remat_change_nothing(options):
    kept = {"skip": "release", "skip_streams": "both"}
    params = trained(make(**kept))
    assert_close(objective(make(**kept, **options).apply)(params), objective(make(**kept).apply)(params))


@pytest.mark.slow
@pytest.mark.parametrize(("skip", "depth"), [("release", 5), ("release", 4), ("release", 2)])
def test_capture_block_gives_the_streams_before_the_merge(skip, depth):
    model = make(skip=skip, depth=depth, skip_streams="both", capture="block")
    params = trained(model)
    wanted = loop(params, *inputs(), depth=depth, skip=skip, both=True, capture="block")
    assert_close(model.apply(params, *inputs()), wanted)


def test_text_and_image_meet_in_the_attention():
    model = make(depth=2)
    params, (x, t, y) = trained(model), inputs()
    out, features = model.apply(params, x, t, y)
    other = {"context": y["context"].at[:, 3].add(1.0)}
    out_y, features_y = model.apply(params, x, t, other)
    assert np.abs(out - out_y).max() > 1e-4
    np.testing.assert_array_equal(features[0], features_y[0])
    assert np.abs(features.text[1] - features_y.text[1])[:, [0, 1, 2, 4]].min(axis=(1, 2)).max() > 0
    shuffled = {"context": y["context"][:, ::-1]}  # positions of text are in its features alone
    assert_close(model.apply(params, x, t, shuffled)[0], out)


def test_at_first_blocks_are_identities_and_torchs_are_not():
    x, t, y = inputs()
    for init, same in (("adaln_zero", True), ("torch", False)):
        model = make(init=init)
        params = model.init(jax.random.key(0))
        out, features = model.apply(params, x, t, y)
        assert np.any(out) != same
        for stream in (features, features.text):
            assert all(np.array_equal(f, stream[0]) == same for f in stream[1:])
        if init == "torch":  # kernels and biases in +- 1 / sqrt(inputs), spread over it
            for name, leaf in by_name(params).items():
                kernel = by_name(params)[re.sub("bias$", "kernel", name)]
                stacked = name.startswith(("shallow", "deep"))
                bound = kernel.shape[int(stacked)] ** -0.5
                assert 0.6 * bound < np.abs(leaf).max() <= bound, name


def test_options_of_stable_diffusion_3():
    null = {"context": CONTEXT["context"], "pooled": np.zeros(3, np.float32)}
    model = make(null=null, qk_norm="layer", registers=2)
    params, (x, t, y) = trained(model), inputs()
    y = y | {"pooled": jnp.ones((BATCH, 3))}
    out, features = model.apply(params, x, t, y)
    assert features.text[0].shape == (BATCH, TOKENS, WIDTH), "registers are no text"
    for changed in (
        y | {"pooled": 2 * y["pooled"]},
        y | {"mask": jnp.ones((BATCH, TOKENS), bool)},  # only losses read it
    ):
        apart = np.abs(model.apply(params, x, t, changed)[0] - out).max()
        assert (apart > 1e-4) == ("mask" not in changed)
    scaled = params | {"registers": 2 * params["registers"]}
    assert np.abs(model.apply(scaled, x, t, y)[0] - out).max() > 1e-4


def test_skips_are_cut_and_measured_as_those_of_the_image():
    model = make(skip="release", skip_streams="both")
    assert model.skips.pairs == ((2, 4), (1, 5))
    params = trained(model)
    cut = model.skips.cut(params, jnp.zeros(2))
    assert np.abs(model.apply(cut, *inputs())[0] - model.apply(params, *inputs())[0]).max() > 1e-4
    np.testing.assert_array_equal(cut["text_merges"]["linear"]["kernel"], params["text_merges"]["linear"]["kernel"])
    assert len(params["text_merges"]["linear"]["bias"]) == 1, "the last block gives no text"
    assert len(trained(make(skip="paper", skip_streams="both"))["text_merges"]["linear"]["bias"]) == 2
    assert [block["image"]["fc1"]["bias"].shape for block in model.blocks(params)] == [(2 * WIDTH,)] * 5
    assert len(make(depth=2).blocks(make(depth=2).init(jax.random.key(0)))) == 2


@pytest.mark.parametrize("sizes", [pytest.param({"fsdp": 4}, marks=pytest.mark.slow), {"tensor": 2, "fsdp": 2}])
def test_it_computes_the_same_on_eight_devices(sizes):
    model = make(skip="release", skip_streams="both", depth=4, width=64)
    params, given = trained(model), inputs(8)
    wanted = jax.jit(model.apply)(params, *given)
    layout = sharding.make(**sizes).with_rules(model.rules)
    where = sharding.shardings(params, layout)
    split = {name: tuple(spec.spec) for name, spec in by_name(where).items()}
    for name in ("shallow/image/qkv/kernel", "deep/text/fc1/kernel", "last/image/proj/kernel", "last/text/qkv/kernel"):
        axes = set(filter(None, jax.tree.leaves(split[name])))
        assert axes == set(sizes), f"{name} is split over {axes}"
    with jax.set_mesh(layout.mesh):
        rows = jax.device_put(given, sharding.over_batch(layout))
        found = jax.jit(model.apply)(sharding.put(params, where), *rows)
    assert_close(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"table": 3}, "model.table = 3: must be at least 4"),
        ({"skip_streams": "both"}, "model.skip_streams = 'both' has no effect while model.skip is 'none'"),
        ({"skip_streams": "text"}, "model.skip_streams = 'text' is unknown"),
        ({"qk_norm": "l2"}, "model.qk_norm = 'l2' is unknown"),
        ({"init": "zero"}, "model.init = 'zero' is unknown"),
        ({"heads": 3}, "model.heads = 3 does not divide the width 16"),
        ({"depth": 1}, "model.depth = 1: must be"),
        ({"null": np.zeros((), np.int32)}, "model mmdit takes features of text, and .* are others"),
        ({"read_blocks": (6,)}, "config.losses: block = 6"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make(**options)


def test_a_condition_of_another_width_is_refused():
    model, (x, t, y) = make(), inputs()
    params = trained(model)
    with pytest.raises(ValueError, match=re.escape("text features 6 wide, given (5, 12)")):
        model.apply(params, x, t, {"context": jnp.tile(y["context"], 2)})
    with pytest.raises(ValueError, match="takes examples of shape"):
        model.apply(params, x[:, :4], t, y)


def test_features_are_a_tree_of_two_streams():
    made = Features([jnp.zeros(1), jnp.ones(2)], [jnp.full(3, 2.0)])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, made)
    assert isinstance(doubled, Features)
    assert (len(doubled), doubled.text[0][0], doubled[1][0]) == (2, 4.0, 2.0)
    assert list(itertools.chain(made[1:])) == [made[1]]

"""The diffusion transformer: sizes, scan equal to a loop, rematerialisation, split loops, initial values, precision."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diversedit_jax import models, sharding
from diversedit_jax.api import Conditions, Model, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, dit
from diversedit_jax.models.dit import REMAT, SIZES, SKIPS, Block, Merge
from diversedit_jax.models.patches import patchify, position_table, unpatchify
from tests.jaxprs import equations

SHAPE, CLASSES, WIDTH, HEADS, BATCH = (4, 8, 3), 5, 16, 2, 3  # not square: height and width cannot be confused
SPACE = Space(SHAPE, Conditions.labels(CLASSES))
GRID = (2, 4)  # of patches
RNGS = Keys(jax.random.key(0))


def make(read_blocks=(), inputs=None, **options) -> Model:
    given = {"depth": 4, "width": WIDTH, "heads": HEADS, "mlp_ratio": 2.0} | options
    return models.make("dit", SPACE, inputs, read_blocks, **given)


def inputs():
    x = np.random.default_rng(1).standard_normal((BATCH, *SHAPE), dtype=np.float32)
    return jnp.asarray(x), jnp.array([0.1, 0.5, 0.8]), jnp.array([0, 3, CLASSES])


def trained(model: Model, seed: int = 0):
    """Parameters none of which is zero, so that every part of the network takes part."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), abstract)


def objective(apply):
    """A loss that reads the prediction and every feature, each with its own random weights."""

    def loss(params):
        out, features = apply(params, *inputs())
        keys = jax.random.split(jax.random.key(7), len(features) + 1)
        terms = [jnp.vdot(jax.random.normal(k, f.shape), f) for k, f in zip(keys, (out, *features), strict=True)]
        return sum(terms) / len(terms), (out, features)

    return jax.value_and_grad(loss, has_aux=True)


def initial(model: Model):
    return jax.jit(model.init)(jax.random.key(0))


def run(model: Model, params):
    return jax.jit(model.apply)(params, *inputs())


def assert_close(found, wanted, message: str, tolerance: float = 2e-5):
    """Equal up to float32 rounding, relative to the largest element of each array."""

    def compare(path, ours, theirs):
        scale = np.abs(theirs).max() + 1e-12
        name = f"{message}: {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=tolerance, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, wanted)


# --- Sizes.

MILLIONS = {"S": 32.86, "B": 130.30, "L": 457.82, "XL": 674.82}
SKIP_PARAMETERS = {"S": 1_780_992, "B": 7_100_928, "L": 25_227_264, "XL": 37_239_552}


def count(size: str, skip: str) -> int:
    model = models.make("dit", Space((32, 32, 4), Conditions.labels(1000)), size=size, skip=skip)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_papers(size):
    plain, width, half = count(size, "none"), SIZES[size].width, SIZES[size].depth // 2
    assert round(plain / 1e6, 2) == MILLIONS[size]
    for skip in ("release", "paper", "skip_dit"):
        assert count(size, skip) - plain == SKIP_PARAMETERS[size], skip
    norms = half * 4 * width  # U-ViT has none
    assert count(size, "uvit") - plain == SKIP_PARAMETERS[size] - norms


# --- The scans equal a loop over the blocks.


def unrolled(params, x_t, t, y, *, depth: int, skip: str):
    """The same network, one block after another."""
    form, half = SKIPS[skip], depth // 2

    def module(build, params, i):
        return nnx.merge(nnx.graphdef(nnx.eval_shape(build)), jax.tree.map(lambda p: p[i], params))

    def block(i):
        stack, j = (params["shallow"], i) if i < half else (params["deep"], i - half)
        return module(lambda: Block(WIDTH, HEADS, 2.0, "none", jnp.dtype("float32"), rngs=RNGS), stack, j)

    def merge(k):
        build = dit.merging(form, WIDTH, jnp.dtype("float32"))
        return module(lambda: build(rngs=RNGS), params["merges"], k)

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    x = linear(params["patch_embed"], patchify(x_t, (2, 2))) + position_table(GRID, WIDTH)
    angles = t[:, None] * 10000.0 ** -(np.arange(128) / 128)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)  # of t itself, not of 1000 t
    c = linear(params["time_embed"]["fc2"], jax.nn.silu(linear(params["time_embed"]["fc1"], waves)))
    c = c + params["label_embed"]["embedding"][y]
    features, skips = [x], []
    for i in range(depth):
        partner = depth - 1 - i
        pair = form is not None and partner < i  # not in the middle of an odd depth
        if pair and form.merge == "pre":
            x = merge(half - 1 - partner)(x, skips[partner])
        x = block(i)(x, c)
        if pair and form.merge == "post":
            x = merge(half - 1 - partner)(x, skips[partner])
        skips.append(x)
        features.append(x)
    shift, scale = jnp.split(linear(params["final_ada"], jax.nn.silu(c)), 2, axis=1)
    out = linear(params["final"], dit.modulate(x, shift, scale))
    return unpatchify(out, SHAPE, (2, 2)), tuple(features)


def first_and_slow(first, every):
    """The cases of the default run, and those that `-m slow` adds."""
    return [case if case in first else pytest.param(*case, marks=pytest.mark.slow) for case in every]


EVERY = [(skip, depth) for skip in SKIPS for depth in (4, 5)]


@cache
def of_the_loop(skip: str, depth: int):
    """The loss, (prediction, features), and gradient of the unrolled network."""
    params = trained(make(skip=skip, depth=depth))
    return jax.device_get(jax.jit(objective(partial(unrolled, depth=depth, skip=skip)))(params))


def assert_equal_to_the_loop(skip: str, depth: int, read_blocks=(), **options):
    model = make(read_blocks, skip=skip, depth=depth, **options)
    (_, found), gradient = jax.jit(objective(model.apply))(trained(model))
    (_, wanted), wanted_gradient = of_the_loop(skip, depth)
    assert len(found[1]) == depth + 1
    assert_close(found, wanted, f"{skip}, depth {depth}: outputs")
    assert_close(gradient, wanted_gradient, f"{skip}, depth {depth}: gradient")


# test_golden_sit does the same for `none` and `release` at depth 4, with the public references as the loop.
@pytest.mark.parametrize(("skip", "depth"), first_and_slow([("release", 5)], EVERY))
def test_scan_equals_a_loop_over_the_blocks(skip, depth):
    assert_equal_to_the_loop(skip, depth)


# The first: scans of one block each, in both halves.
READ_BLOCKS = [("release", 5, (1, 4)), ("paper", 5, (2, 4)), ("none", 5, (0, 3, 4, 5))]


@pytest.mark.parametrize(("skip", "depth", "read_blocks"), first_and_slow(READ_BLOCKS[:1], READ_BLOCKS))
def test_read_blocks_change_nothing(skip, depth, read_blocks):
    assert_equal_to_the_loop(skip, depth, read_blocks)


UNROLLED = [("release", 5, {"read_blocks": (1, 4)}), *((skip, depth, {}) for skip, depth in EVERY if depth == 4)]
UNROLLED += [("release", 5, {"remat": remat}) for remat in ("full", "none")]


@pytest.mark.parametrize(("skip", "depth", "options"), first_and_slow(UNROLLED[:1], UNROLLED))
def test_unrolled_it_is_the_loop(skip, depth, options):
    assert_equal_to_the_loop(skip, depth, unroll=True, **options)


def test_unrolled_it_has_the_same_forward_mode():
    """Which MeanFlow needs."""
    networks = [make(inputs={"span": ()}, skip="release", unroll=unroll) for unroll in (False, True)]
    params, (x, t, y) = trained(networks[0]), inputs()

    def derivative(model):
        def along(x, t):
            return model.apply(params, x, t, y, span=t / 2)[0]

        return jax.jit(lambda: jax.jvp(along, (x, t), (jnp.cos(x), jnp.ones_like(t))))()

    loop, found = map(derivative, networks)
    assert_close(found, loop, "value and derivative")


@pytest.mark.parametrize(("unroll", "stacks"), [(True, False), (False, True)])
def test_unrolled_it_stacks_no_features(unroll, stacks):
    """Neither forward nor backward: a stack is filled with zeros, written and read once more than what it holds."""
    model = make(skip="release", depth=6, unroll=unroll)
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradient = jax.make_jaxpr(objective(model.apply))(params)
    shapes = {v.aval.shape for equation in equations(gradient.jaxpr) for v in equation.outvars}
    assert ((3, BATCH, SHAPE[0] * SHAPE[1] // 4, WIDTH) in shapes) == stacks


@pytest.mark.parametrize(("platform", "scans"), [("tpu", 0), ("gpu", 2), ("cpu", 2)])
def test_by_default_it_is_unrolled_on_tpus(platform, scans, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    assert scans_of(make()) == scans
    assert scans_of(make(unroll=not scans)) == scans
    assert scans_of(make(unroll=bool(scans))) == 2 - scans


def scans_of(model: Model) -> int:
    params = jax.eval_shape(model.init, jax.random.key(0))
    return sum(e.primitive.name == "scan" for e in equations(jax.make_jaxpr(model.apply)(params, *inputs()).jaxpr))


def test_a_loop_is_split_behind_read_blocks():
    def scans(read_blocks, skip):
        return scans_of(make(read_blocks, skip=skip, depth=9))

    assert [scans(read_blocks, "none") for read_blocks in ((), (2,), (2, 3, 7), (0, 4, 9))] == [2, 3, 5, 2]
    assert [scans(read_blocks, "release") for read_blocks in ((), (2,), (2, 3, 7), (0, 4, 5, 9))] == [3, 4, 6, 3]


# --- Rematerialisation.


def residual_bytes(model) -> int:
    """What the forward pass keeps for the backward pass, without the parameters."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    kept = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, *inputs())[0], p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("skip", ["none", "release"])
def test_remat_changes_what_is_kept(skip):
    kept = {remat: residual_bytes(make(skip=skip, depth=6, remat=remat)) for remat in REMAT}
    # `full` keeps each block's input and its parameters' slices, a policy of names the outputs of its matmuls as well.
    assert kept["full"] < 0.7 * kept["named"], kept
    assert kept["full"] < 0.7 * kept["dots"], kept
    assert kept["named"] < 0.7 * kept["none"], kept
    assert kept["dots"] < 0.7 * kept["none"], kept


@pytest.mark.parametrize("remat", ["full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "none"))])
def test_remat_changes_nothing_else(remat):
    assert_equal_to_the_loop("release", 5, remat=remat)


def temporaries(skip: str, depth: int, read=None, read_blocks=(), **options) -> float:
    """Memory of a gradient beside its arguments and results, in features [b n d]."""
    space = SPACE._replace(shape=(8, 8, 4))
    batch, width = 512, 32  # activations far larger than parameters
    model = models.make("dit", space, {}, read_blocks, depth=depth, width=width, heads=1, skip=skip, **options)

    def loss(params, x, t, y):
        out, features = model.apply(params, x, t, y)
        return jnp.mean(out**2) + (0 if read is None else jnp.sin(features[read]).mean())

    args = [((batch, *space.shape), "float32"), ((batch,), "float32"), ((batch,), "int32")]
    args = [jax.ShapeDtypeStruct(*arg) for arg in args]
    compiled = jax.jit(jax.grad(loss)).lower(jax.eval_shape(model.init, jax.random.key(0)), *args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * batch * 16 * width)


def check_cut(skip: str, read: int, **options):
    """One feature costs itself and its cotangent, slices of the parameters (0.4), and no part of the stack."""
    depth = 48
    plain = temporaries(skip, depth, **options)
    cut = temporaries(skip, depth, read, (read,), **options) - plain
    whole = temporaries(skip, depth, read, **options) - plain
    # XLA's order of operations moves these numbers by two features, so the stack, half the depth, must be large.
    assert whole > 20, f"without a cut block {read} costs {whole:.2f} features: the test no longer sees the stack of 24"
    assert cut < 2.4 + 2, f"cut there, block {read} costs {cut:.2f} features more than reading none"


@pytest.mark.slow
@pytest.mark.parametrize("read", [6, 32])
def test_nor_does_reading_it_before_its_merge(read):
    check_cut("release", read, remat="full", capture="block")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["named", "full"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("read", [4, 16, 32])
def test_reading_one_block_does_not_keep_the_stack(skip, read, remat):
    check_cut(skip, read, remat=remat)


# --- Features.


def test_capture_block_gives_the_stream_before_the_merge():
    options = {"skip": "release", "depth": 5}
    params = trained(make(**options))
    out, merged = run(make(**options), params)
    same_out, before = run(make(**options, capture="block"), params)
    assert_close(same_out, out, "the prediction")
    for k in range(4):
        assert_close(before[k], merged[k], f"features[{k}], where nothing merges")
    for k, partner in ((4, 2), (5, 1)):
        build = lambda: Merge(WIDTH, True, "xavier", jnp.dtype("float32"), rngs=RNGS)  # noqa: E731
        merge = nnx.merge(nnx.graphdef(nnx.eval_shape(build)), jax.tree.map(lambda p, k=k: p[k - 4], params["merges"]))
        assert_close(merge(before[k], merged[partner]), merged[k], f"features[{k}], merged with features[{partner}]")


def test_blocks_are_identities_at_initialisation_and_the_output_is_zero():
    for skip, same in [("none", 6), ("release", 3)]:
        model = make(skip=skip, depth=6)
        out, features = run(model, initial(model))
        assert not np.any(out)
        for k in range(1, same + 1):
            np.testing.assert_array_equal(features[k], features[0], err_msg=f"{skip}: block {k} is not the identity")
        if skip == "release":
            assert all(np.abs(features[k] - features[0]).max() > 0.1 for k in range(4, 7)), "the merges change nothing"


def test_gates_change_nothing_at_first_and_then_add_the_skip():
    plain, gated = make(skip="none", depth=5), make(skip="gate", depth=5)
    params = trained(gated)
    closed = params | {"merges": jax.tree.map(jnp.zeros_like, params["merges"])}
    assert not np.any(initial(gated)["merges"]["gate"])
    without = {name: tree for name, tree in params.items() if name != "merges"}
    np.testing.assert_array_equal(run(gated, closed)[0], run(plain, without)[0])
    assert np.abs(run(gated, params)[0] - run(gated, closed)[0]).max() > 1e-3
    current, skip = gated.skips.norms(params)
    np.testing.assert_allclose(current, WIDTH**0.5)
    np.testing.assert_allclose(skip, jnp.linalg.norm(params["merges"]["gate"], axis=1))
    np.testing.assert_array_equal(run(gated, gated.skips.cut(params, jnp.zeros(2)))[0], run(gated, closed)[0])
    with pytest.raises(ConfigError, match=r"model.skip_init = 'identity' has no effect while model.skip is 'gate'"):
        make(skip="gate", skip_init="identity")


def test_features_start_with_the_embedding():
    model = make(depth=3)
    params = trained(model)
    x, _, _ = inputs()
    _, features = run(model, params)
    embedded = patchify(x, (2, 2)) @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    assert_close(features[0], embedded + position_table(GRID, WIDTH), "features[0]")
    assert {f.shape for f in features} == {(BATCH, 8, WIDTH)}


# --- Initial values.


def test_identity_merges_leave_the_plain_model():
    plain, skipped = make(depth=5), make(depth=5, skip="uvit", skip_init="identity")
    params = trained(plain)
    merges = initial(skipped)["merges"]
    found = run(skipped, params | {"merges": merges})
    assert_close(found, run(plain, params), "U-ViT's merges at identity", tolerance=1e-6)


def test_initial_values():
    width = 64
    model = models.make("dit", SPACE, depth=4, width=width, heads=2, skip="release")
    params = initial(model)

    def uniform(leaf, bound, name):
        assert bound * 0.98 < np.abs(leaf).max() <= bound * 1.00001, f"{name}: {np.abs(leaf).max()}, bound {bound}"

    block = params["shallow"]
    uniform(block["qkv"]["kernel"], (6 / (4 * width)) ** 0.5, "qkv, Xavier as one matrix [d, 3 d]")
    uniform(block["proj"]["kernel"], (6 / (2 * width)) ** 0.5, "proj")
    uniform(block["fc1"]["kernel"], (6 / (5 * width)) ** 0.5, "fc1")
    uniform(params["deep"]["fc2"]["kernel"], (6 / (5 * width)) ** 0.5, "fc2")
    uniform(params["merges"]["linear"]["kernel"], (6 / (3 * width)) ** 0.5, "merge")
    for name in ("label_embed.embedding", "time_embed.fc1.kernel", "time_embed.fc2.kernel"):
        leaf = params
        for part in name.split("."):
            leaf = leaf[part]
        np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.1, err_msg=name)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name or "ada" in name or "'final'" in name:
            assert not np.any(leaf), f"{name} is not zero"
    kernels = np.concatenate([params["shallow"]["fc1"]["kernel"], params["deep"]["fc1"]["kernel"]])
    assert len({kernel.tobytes() for kernel in kernels}) == 4, "two blocks start with the same weights"


@pytest.mark.parametrize(("skip", "init"), [("skip_dit", None), ("uvit", "torch")])
def test_torch_init_of_merges(skip, init):
    merges = initial(make(width=64, skip=skip, skip_init=init, depth=8))["merges"]["linear"]
    bound = 128**-0.5
    for name in ("kernel", "bias"):
        leaf = np.abs(merges[name])
        assert 0.95 * bound < leaf.max() <= bound, f"{name}: up to {leaf.max()}, bound {bound}"
        np.testing.assert_allclose(leaf.mean(), bound / 2, rtol=0.1, err_msg=f"{name} is not uniform")
    assert len(np.unique(merges["bias"])) == merges["bias"].size, "blocks share their biases"


def test_uvit_merges_start_as_a_normal():
    kernel = initial(make(width=64, skip="uvit"))["merges"]["linear"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)
    assert 0.06 < np.abs(kernel).max() < 0.12, "U-ViT's code cuts at 2, not at two standard deviations"


# --- Conditions.


def test_labels_enter_through_the_table_only():
    model = make()
    params = trained(model)
    assert params["label_embed"]["embedding"].shape == (CLASSES + 1, WIDTH), "classes and the null label"
    x, t, _ = inputs()
    apply = jax.jit(model.apply)

    def output(params, label):
        return np.asarray(apply(params, x, t, jnp.full(BATCH, label))[0])

    np.testing.assert_array_equal(output(params, 2), output(params, 2), err_msg="the model draws something itself")
    table = params["label_embed"]["embedding"]
    swapped = params | {
        "label_embed": {"embedding": table.at[jnp.array([2, CLASSES])].set(table[jnp.array([CLASSES, 2])])}
    }
    np.testing.assert_array_equal(output(params, CLASSES), output(swapped, 2))
    assert np.abs(output(params, 2) - output(params, CLASSES)).max() > 1e-3
    assert np.isfinite(output(params, CLASSES)).all()


def test_time_is_embedded_as_it_is():
    """Sinusoids of t in [0, 1] and not of 1000 t: the slowest is nearly constant, the fastest is cos t."""
    embed = dit.TimeEmbedding(256, rngs=RNGS)
    embed.fc1.kernel[...], embed.fc2.kernel[...] = jnp.eye(256), jnp.eye(256)
    t = jnp.linspace(0, 1, 9)
    waves = embed(t)
    np.testing.assert_allclose(waves[:, 0], jax.nn.silu(jnp.cos(t)), rtol=1e-5)
    np.testing.assert_allclose(waves[:, 128], jax.nn.silu(jnp.sin(t)), atol=1e-6)
    slowest = 10000.0 ** -(127 / 128)
    np.testing.assert_allclose(waves[:, 255], jax.nn.silu(jnp.sin(slowest * t)), rtol=1e-4, atol=1e-8)


def test_position_table():
    table, quarter = position_table((3, 5), 12), 3
    assert table.shape == (15, 12)
    for row in range(3):
        for column in range(5):
            entry = table[row * 5 + column]
            for k in range(quarter):
                rate = 1 / 10000 ** (k / quarter)
                wanted = [np.sin(column * rate), np.cos(column * rate), np.sin(row * rate), np.cos(row * rate)]
                np.testing.assert_allclose(entry[k::quarter], wanted, atol=1e-6, err_msg=f"({row}, {column}), {k}")


def test_patches():
    x = jax.random.normal(jax.random.key(0), (2, 6, 9, 2))
    patches = patchify(x, (3, 3))
    assert patches.shape == (2, 6, 18)
    np.testing.assert_array_equal(patches[1, 4].reshape(3, 3, 2), x[1, 3:6, 3:6], err_msg="patch 4 is row 1, column 1")
    np.testing.assert_array_equal(unpatchify(patches, (6, 9, 2), (3, 3)), x)


# --- Precision.


def test_bfloat16_is_for_matmuls_only():
    options = {"skip": "release", "depth": 5, "qk_norm": True}
    exact, half = make(**options), make(**options, dtype="bfloat16")
    params = trained(exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0)))} == {
        np.dtype("float32")
    }
    out, features = run(half, params)
    assert out.dtype == jnp.float32
    assert {f.dtype for f in features} == {np.dtype("float32")}, "the residual stream follows stream_dtype"

    jaxpr = jax.make_jaxpr(half.apply)(params, *inputs()).jaxpr
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    wide = [e for e in dots if any(v.aval.dtype == jnp.float32 for v in e.invars)]
    # The two of the time embedding; softmax times v accumulates in float32 too, but its inputs are bfloat16.
    assert len(wide) == 2, "\n".join(map(str, wide))
    highest = (jax.lax.Precision.HIGHEST,) * 2  # else a TPU rounds what it multiplies to bfloat16
    assert [e.params["precision"] for e in wide] == [highest] * 2
    assert len(dots) > 12
    narrow = [
        e.primitive.name
        for e in equations(jaxpr)
        if e.primitive.name in ("exp", "rsqrt") and e.outvars[0].aval.dtype == jnp.bfloat16
    ]
    assert not narrow, f"softmax or a norm in bfloat16: {narrow}"

    wanted, wanted_features = run(exact, params)
    error = max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip((out, *features), (wanted, *wanted_features), strict=True)
    )
    assert 1e-5 < error < 0.05, f"relative error {error}: bfloat16 keeps 8 bits, 0.4% a product"


def test_stream_dtype():
    model = make(dtype="bfloat16", stream_dtype="bfloat16", skip="release")
    out, features = jax.eval_shape(model.apply, trained(model), *inputs())
    assert {f.dtype for f in features} == {np.dtype(jnp.bfloat16)}
    assert out.dtype == jnp.float32


def test_qk_norm_has_separate_parameters():
    model = make(qk_norm=True)
    params = trained(model)
    out = run(model, params)[0]
    for name in ("q_norm", "k_norm"):
        norm = params["deep"][name]
        assert norm["scale"].shape == (2, WIDTH // HEADS)
        changed = params | {"deep": params["deep"] | {name: norm | {"scale": norm["scale"] * 1.5 + 0.2}}}
        assert np.abs(run(model, changed)[0] - out).max() > 1e-4, f"{name} has no effect"
    assert "q_norm" not in jax.eval_shape(make().init, jax.random.key(0))["deep"]


def test_forward_mode_equals_reverse_mode():
    model = make(depth=2)
    params, (x, t, y) = trained(model), inputs()
    tangents = (jax.random.normal(jax.random.key(3), x.shape), jnp.ones(BATCH))
    weights = jax.random.normal(jax.random.key(4), x.shape)

    def loss(x, t):
        return jnp.vdot(weights, model.apply(params, x, t, y)[0])

    _, forward = jax.jit(lambda: jax.jvp(loss, (x, t), tangents))()
    products = [g * v for g, v in zip(jax.jit(jax.grad(loss, (0, 1)))(x, t), tangents, strict=True)]
    # The sum is 1.5, of terms whose magnitudes add up to 320. Each machine rounds them in its own way.
    rounding = 1e-6 * float(sum(jnp.abs(terms).sum() for terms in products))
    np.testing.assert_allclose(forward, sum(terms.sum() for terms in products), atol=rounding)


# --- Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, r"model.patch: patches of 3 x 3 do not divide examples of 4 x 8"),
        ({"patch": 0}, r"model.patch = 0: must be at least 1"),
        ({"heads": 3}, r"model.heads = 3 does not divide the width 16"),
        ({"heads": 0}, r"model.heads = 0: must be at least 1"),
        ({"width": 18, "heads": 1}, r"model.width = 18: the position table needs a multiple of 4"),
        ({"depth": 1}, r"model.depth = 1: must be at least 2"),
        ({"size": "XXL"}, r"model.size = 'XXL' is unknown; did you mean 'XL'"),
        ({"skip": "realease"}, r"model.skip = 'realease' is unknown; did you mean 'release'"),
        ({"remat": "some"}, r"model.remat = 'some' is unknown; .*named, dots, full, none"),
        ({"dtype": "float8"}, r"model.dtype = 'float8' is unknown"),
        ({"stream_dtype": "int8"}, r"model.stream_dtype = 'int8' is unknown"),
        ({"capture": "before"}, r"model.capture = 'before' is unknown; .*merged, block"),
        ({"skip_init": "torch"}, r"model.skip_init = 'torch' has no effect while model.skip is 'none'"),
        ({"skip": "uvit", "skip_init": "zero"}, r"model.skip_init = 'zero' is unknown"),
        ({"attention": "flash"}, r"model.attention = 'flash' is unknown; .*auto, xla, cudnn, splash"),
        (
            {"attention": "cudnn", "dtype": "bfloat16"},
            r"'cudnn' is not possible: the device is a cpu, not a GPU",
        ),
        ({"read_blocks": (5,)}, r"config.losses: block = 5: must be at least 0 and at most 4"),
        ({"read_blocks": (-1,)}, r"config.losses: block = -1: must be at least 0 and at most 4"),
        ({"colour": 1}, r"models.dit: no option 'colour'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_an_image_of_another_shape_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"takes examples of shape \(4, 8, 3\), given \(8, 4, 3\)"):
        jax.eval_shape(model.apply, trained(model), jnp.ones((BATCH, 8, 4, 3)), *inputs()[1:])

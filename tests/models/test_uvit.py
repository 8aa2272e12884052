"""U-ViT beside an independent loop over its blocks: loops, remat, conditions, initial values, skips, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, sharding
from diversedit_jax.api import Conditions, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import dit, patches
from diversedit_jax.sharding import by_name
from tests.models.test_mmdit import assert_close, trained

SHAPE, WIDTH, HEADS, BATCH = (8, 4, 2), 12, 2, 2
LABELS, NOTHING = Conditions.labels(3), Conditions.labels(0)
TEXT = Conditions({"context": np.zeros((5, 6), np.float32)})


def make(conditions=LABELS, read_blocks=(), shape=SHAPE, **options):
    dims = {"depth": 4, "width": WIDTH, "heads": HEADS, "mlp_ratio": 2.0} | options
    return models.make("uvit", Space(shape, conditions), {}, read_blocks, **dims)


def inputs(conditions=LABELS, b=BATCH, shape=SHAPE):
    keys = jax.random.split(jax.random.key(3), 2)
    y = jnp.arange(b) % 4 if conditions.classes else jnp.zeros(b, int)
    if conditions is TEXT:
        y = {"context": jax.random.normal(keys[0], (b, 5, 6))}
    return jax.random.normal(keys[1], (b, *shape)), jnp.linspace(20.0, 90.0, b), y


def loop(params, x_t, t, y, *, half):
    """The same network, by the formulas and one block after another."""

    def linear(p, x):
        return jnp.tensordot(x, p["kernel"], 1) + p.get("bias", 0)

    def norm(p, x, eps=1e-5):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * p["scale"] + p["bias"]

    def block(stack, i, x):
        p = jax.tree.map(lambda leaf: leaf[i], params[stack])
        q, k, v = jnp.moveaxis(linear(p["qkv"], norm(p["norm1"], x)), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + linear(p["proj"], out.reshape(x.shape))
        return x + linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], norm(p["norm2"], x)), approximate=False))

    angles = t[:, None] * 10000.0 ** -(np.arange(WIDTH // 2) / (WIDTH // 2))
    time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    if "time_embed" in params:
        time = linear(params["time_embed"]["fc2"], jax.nn.silu(linear(params["time_embed"]["fc1"], time)))
    tokens = [time[:, None]]
    if "label_embed" in params:
        tokens = [params["label_embed"]["embedding"][y][:, None], *tokens]
    if "text_embed" in params:
        tokens += [linear(params["text_embed"], y["context"])]
    embedded = linear(params["patch_embed"], patches.patchify(x_t, (2, 2)))
    x = jnp.concatenate([*tokens, embedded], axis=1) + params["positions"]
    streams = [x]
    for i in range(half):
        streams.append(block("ins", i, streams[-1]))
    streams.append(block("mid", 0, streams[-1]))
    for i in range(half):
        both = jnp.concatenate([streams[-1], streams[half - i]], axis=-1)
        merge = jax.tree.map(lambda leaf, i=i: leaf[i], params["merges"])
        both = norm(merge["norm"], both, dit.EPS) if "norm" in merge else both
        streams.append(block("outs", i, linear(merge["linear"], both)))
    features = tuple(stream[:, -embedded.shape[1] :] for stream in streams)
    out = patches.unpatchify(linear(params["final"], norm(params["norm"], features[-1])), x_t.shape[1:], (2, 2))
    if "conv" in params:
        padded = jnp.pad(out, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = out.shape[1:3]
        shifted = [[padded[:, i : i + h, j : j + w] for j in range(3)] for i in range(3)]
        out = jnp.einsum("ijbhwc,ijco->bhwo", jnp.array(shifted), params["conv"]["kernel"]) + params["conv"]["bias"]
    return out, features


def objective(apply, conditions=LABELS):
    def loss(params):
        out, features = apply(params, *inputs(conditions))
        return jnp.mean(out**2) + sum(jnp.sin(f).mean() * (k + 1) for k, f in enumerate(features)), (out, features)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


CASES = [(LABELS, {}), (NOTHING, {"depth": 3, "time_mlp": True, "qkv_bias": True}), (TEXT, {"depth": 6, "conv": False})]
CASES += [(LABELS, {"skip": "paper"})]


@pytest.mark.slow  # the golden vectors show the same
@pytest.mark.parametrize(("conditions", "options"), CASES)
def test_it_equals_a_loop_over_the_formulas(conditions, options):
    model, half = make(conditions, **options), options.get("depth", 4) // 2
    params = trained(model)
    (_, (out, features)), gradient = objective(model.apply, conditions)(params)
    wanted = objective(lambda *given: loop(*given, half=half), conditions)(params)
    assert len(features) == 2 * half + 2
    assert {f.shape for f in features} == {(BATCH, 8, WIDTH)}
    assert (model.grid, model.prefix, len(model.blocks(params))) == ((4, 2), 0, 2 * half + 1)
    assert_close((out, features), wanted[0][1])
    assert_close(gradient, wanted[1])


OPTIONS = [{"read_blocks": (1, 4), "remat": "full"}, {"unroll": True}, {"remat": "none"}]
OPTIONS += [{"remat": "dots", "unroll": True}, {"read_blocks": (0, 2, 3, 5)}]


@pytest.mark.parametrize("options", [OPTIONS[0], *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS[1:])])
def test_loops_and_remat_change_nothing(options):
    params = trained(make())
    assert_close(objective(make(**options).apply)(params), objective(make().apply)(params))


@pytest.mark.slow
def test_half_precision_stays_near():
    model, low = make(), make(dtype="bfloat16", stream_dtype="bfloat16")
    params = trained(model)
    (out, features), (ours, halves) = (jax.jit(m.apply)(params, *inputs()) for m in (model, low))
    assert ours.dtype == jnp.float32
    assert {f.dtype for f in halves} == {jnp.dtype("bfloat16")}
    assert_close((ours, *halves), (out, *features), 0.05)


@pytest.mark.slow
def test_every_token_of_the_condition_reaches_the_image():
    for conditions in (LABELS, TEXT):
        model, (x, t, y) = make(conditions, depth=2), inputs(conditions)
        params = trained(model)
        apply = jax.jit(model.apply)
        out, _ = apply(params, x, t, y)
        other = {"context": y["context"].at[:, 4].add(1.0)} if conditions is TEXT else (y + 1) % 4
        assert np.abs(apply(params, x, t, other)[0] - out).max() > 1e-3
        assert np.abs(apply(params, x, t + 0.1, y)[0] - out).max() > 1e-3
    model, (x, t, y) = make(NOTHING, depth=2), inputs(NOTHING)
    params = trained(model)
    np.testing.assert_array_equal(model.apply(params, x, t, y)[0], model.apply(params, x, t, y + 1)[0])


def test_initial_values_are_those_of_the_code():
    model = make(LABELS, width=96, heads=2, depth=4, time_mlp=True, qkv_bias=True)
    leaves = by_name(model.init(jax.random.key(0)))
    bounds = {"patch_embed": 8**-0.5, "conv": 18**-0.5}  # torch's, of convolutions
    for name, leaf in leaves.items():
        part = name.partition("/")[0]
        if part in bounds:
            assert 0.5 * bounds[part] < np.abs(leaf).max() <= bounds[part], name
        elif "norm" in name or name.endswith("bias"):
            np.testing.assert_array_equal(leaf, float(name.endswith("scale")), err_msg=name)
        else:
            wanted = 1.0 if part == "label_embed" else 0.02
            np.testing.assert_allclose(leaf.std(), wanted, rtol=0.1, err_msg=name)


@pytest.mark.slow
def test_a_volume_has_its_convolution():
    shape = (4, 2, 4, 2)
    model = make(shape=shape, depth=2)
    out, features = model.apply(trained(model), *inputs(shape=shape))
    assert (out.shape, features[0].shape, model.grid) == ((BATCH, *shape), (BATCH, 4, WIDTH), (2, 1, 2))


def test_skips_are_cut_and_measured():
    model = make()
    assert model.skips.pairs == ((2, 4), (1, 5))
    params = trained(model)
    kernel = params["merges"]["linear"]["kernel"]
    for found, half in zip(model.skips.norms(params), (kernel[:, :WIDTH], kernel[:, WIDTH:]), strict=True):
        np.testing.assert_allclose(found, np.sqrt((half**2).sum(axis=(1, 2))), rtol=1e-5)
    cut = model.skips.cut(params, jnp.array([1.0, 0.0]))
    zeroed = kernel.at[1, WIDTH:].set(0)
    np.testing.assert_array_equal(cut["merges"]["linear"]["kernel"], zeroed)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"tensor": 2, "fsdp": 2}])
def test_it_computes_the_same_on_eight_devices(sizes):
    model = make(width=64)
    params, given = trained(model), inputs(b=8)
    wanted = jax.jit(model.apply)(params, *given)
    layout = sharding.make(**sizes).with_rules(model.rules)
    where = sharding.shardings(params, layout)
    split = {name: tuple(spec.spec) for name, spec in by_name(where).items()}
    for name in ("ins/qkv/kernel", "mid/fc1/kernel", "outs/proj/kernel"):
        axes = set(filter(None, jax.tree.leaves(split[name])))
        assert axes == set(sizes), f"{name} is split over {axes}"
    with jax.set_mesh(layout.mesh):
        rows = jax.device_put(given, sharding.over_batch(layout))
        found = jax.jit(model.apply)(sharding.put(params, where), *rows)
    assert_close(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "XL"}, "model.size = 'XL' is unknown"),
        ({"heads": 5}, "model.heads = 5 does not divide the width 12"),
        ({"width": 9, "heads": 3}, "model.width = 9: the sinusoids of the time need an even number"),
        ({"depth": 1}, "model.depth = 1: must be"),
        ({"skip": "release"}, "model.skip = 'release' is unknown; known: uvit, paper"),
        ({"patch": 3}, "model.patch: patches of 3 x 3 do not divide examples of 8 x 4"),
        ({"conditions": Conditions(np.zeros(4))}, "model uvit takes labels or features of text"),
        ({"read_blocks": (6,)}, "config.losses: block = 6"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make(**options)


def test_inputs_of_another_shape_are_refused():
    model, (x, t, y) = make(TEXT, depth=2), inputs(TEXT)
    params = trained(model)
    with pytest.raises(ValueError, match=r"text features of shape \(5, 6\), given \(3, 6\)"):
        model.apply(params, x, t, {"context": y["context"][:, :3]})
    with pytest.raises(ValueError, match="takes examples of shape"):
        model.apply(params, x[:, :4], t, y)

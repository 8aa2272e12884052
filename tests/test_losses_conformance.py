"""What every auxiliary loss and every objective keeps to, found by globbing: the contract of `api`, and its options."""

import inspect
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import diversedit_jax
from diversedit_jax import losses, objectives, paths, slots
from diversedit_jax.api import AuxLoss, Forward
from diversedit_jax.objectives import flow_matching

PACKAGE = Path(diversedit_jax.__file__).parent


def files(slot: str) -> list[str]:
    return sorted(path.stem for path in (PACKAGE / slot).glob("*.py") if path.stem != "__init__")


PREDICTED = {"ddpm": 2 * 3}  # channels; 3, those of SHAPE, for the others
LOSSES, OBJECTIVES = files("losses"), files("objectives")
CLASSES, BATCH, TOKENS, WIDTH, DEPTH = 7, 8, 16, 24, 12
SHAPE = (4, 4, 3)


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, *SHAPE), dtype=np.float32)
    y, token = rng.integers(CLASSES, size=BATCH, dtype=np.int32), rng.standard_normal((BATCH, 3), dtype=np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(y), "token/dinov2": jnp.asarray(token)}


def features(seed: int = 0) -> tuple[jax.Array, ...]:
    """The embedding and DEPTH blocks, alike enough for a loss that only acts on similar ones."""
    rng = np.random.default_rng(seed)
    shared, own = (rng.standard_normal((n, BATCH, TOKENS, WIDTH), dtype=np.float32) for n in (1, DEPTH + 1))
    return tuple(jnp.asarray(shared[0] + 0.5 * f) for f in own)


def network(params, x_t, t, y, *, span=None, token=None):
    """A small network of the contract's form, with parameters to differentiate in; t may also count up to 1000."""
    stream = (
        jnp.tile(x_t.reshape(len(x_t), TOKENS, 3), (1, 1, WIDTH // 3))
        + jnp.sin(t)[:, None, None]
        + 0.1 * y[:, None, None]
    )
    if span is not None:
        stream = stream + jnp.cos(span)[:, None, None]
    if token is not None:
        stream = stream + jnp.cos(token).sum(axis=1)[:, None, None]
    outputs = [stream]
    for kernel in params["blocks"]:
        stream = stream + jnp.tanh(stream @ kernel)
        outputs.append(stream)
    out = stream @ params["out"]
    image = out.reshape(*x_t.shape[:-1], -1)
    return image if token is None else (image, out.mean(axis=1)), tuple(outputs)


def params(channels: int = SHAPE[-1]):
    rng = np.random.default_rng(1)
    blocks = 0.2 * rng.standard_normal((DEPTH, WIDTH, WIDTH), dtype=np.float32)
    return {
        "blocks": list(jnp.asarray(blocks)),
        "out": jnp.asarray(0.1 * rng.standard_normal((WIDTH, channels), dtype=np.float32)),
    }


def teacher(x_t, t, y, **conditions):
    return network(params(), x_t, t, y, **conditions)


def forward(features) -> Forward:
    rng = np.random.default_rng(2)
    x, noise = (jnp.asarray(rng.standard_normal((BATCH, *SHAPE), dtype=np.float32)) for _ in range(2))
    t = jnp.linspace(0.05, 0.95, BATCH)
    x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
    y = batch()["y"]
    rerun = Partial(flow_matching.along(paths.make("linear")), x, noise, y)
    return Forward(jnp.ones(BATCH), x, noise, t, x_t, y, features, metrics={}, rerun=rerun)


@pytest.mark.parametrize(("slot", "name"), [("losses", n) for n in LOSSES] + [("objectives", n) for n in OBJECTIVES])
def test_options_are_keywords_with_a_type_and_a_default(slot, name):
    assert name in slots.known(slot)
    make = slots.factory(slot, name)
    positional = {"losses": [], "objectives": ["num_classes"]}[slot]
    signature = inspect.signature(make).parameters
    assert [n for n in signature if n not in slots.options(make)] == positional, "an option that is not keyword-only"
    for option, parameter in slots.options(make).items():
        assert parameter.annotation is not inspect.Parameter.empty, f"{slot}.{name}: {option} has no type"
        assert parameter.default is not inspect.Parameter.empty, f"{slot}.{name}: {option} has no default"
        assert f"{option}" in documentation(slot, name), f"{slot}.{name}: {option} is not in the file's docstrings"
    first = inspect.getdoc(inspect.getmodule(make)).splitlines()[0]
    assert len(first) > 20, f"{slot}.{name}: its first line says what it is"


def documentation(slot: str, name: str) -> str:
    return (PACKAGE / slot / f"{name}.py").read_text()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_contract(name):
    loss = losses.make(name)
    assert isinstance(loss, AuxLoss)
    assert all(0 <= block <= DEPTH for block in loss.blocks)
    init = jax.jit(lambda key: loss.init(key, forward(features()), batch()))
    heads = init(jax.random.key(0))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(heads)), "optimizers take floats"

    def apply(heads, features, step, key):
        return loss.apply(heads, forward(features), batch(), teacher, step, key)

    arguments = heads, features(), jnp.int32(100_000), jax.random.key(1)
    value, metrics = jax.jit(apply)(*arguments)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    assert jnp.isfinite(value)
    for label, metric in metrics.items():
        assert jnp.shape(metric) == (), f"metric {label} is not a scalar"
        assert jnp.isfinite(metric), f"metric {label} = {metric}"
    again, _ = jax.jit(apply)(*arguments)
    assert value == again, "not a function of its arguments"

    (_, _), (head_gradient, gradient) = jax.jit(jax.value_and_grad(apply, argnums=(0, 1), has_aux=True))(*arguments)
    leaves = jax.tree.leaves((head_gradient, gradient))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)
    reached = [k for k, leaf in enumerate(gradient) if jnp.abs(leaf).max() > 0]
    assert reached, f"{name} is constant in the features"
    if loss.blocks:
        assert set(reached) <= set(loss.blocks), (
            f"reads {reached}, announces {loss.blocks}: the network would not be cut there"
        )
    for path, leaf in jax.tree.leaves_with_path(head_gradient):
        assert jnp.abs(leaf).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


@pytest.mark.parametrize("name", LOSSES)
def test_loss_does_not_depend_on_the_order_of_the_batch(name):
    """Where a loss draws nothing per example. One that does is compared with itself under another key, and left out."""
    loss = losses.make(name)
    order = np.random.default_rng(4).permutation(BATCH)

    @jax.jit
    def apply(order, key):
        whole, whole_batch = forward(features()), batch()
        heads = loss.init(jax.random.key(0), whole, whole_batch)
        shuffled, shuffled_batch = jax.tree.map(lambda leaf: leaf[order], (whole, whole_batch))
        return loss.apply(heads, shuffled, shuffled_batch, teacher, jnp.int32(100_000), key)[0]

    straight, other = (apply(np.arange(BATCH), jax.random.key(key)) for key in (0, 1))
    if straight != other:
        pytest.skip(f"{name} draws with its key")
    np.testing.assert_allclose(apply(order, jax.random.key(0)), straight, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_keeps_the_contract(name):
    objective = objectives.make(name, CLASSES)

    weights = params(PREDICTED.get(name, SHAPE[-1]))

    def run(params, key):
        return objective(partial(network, params), batch(), key)

    result = jax.jit(run)(weights, jax.random.key(0))
    assert isinstance(result, Forward)
    assert result.loss.shape == result.t.shape == result.y.shape == (BATCH,)
    assert result.loss.dtype == jnp.float32
    assert result.x.shape == result.noise.shape == result.x_t.shape == (BATCH, *SHAPE)
    assert len(result.features) == DEPTH + 1
    assert all(f.shape == (BATCH, TOKENS, WIDTH) for f in result.features)
    assert all(jnp.shape(metric) == () for metric in result.metrics.values())
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert (result.loss > 0).all()
    assert result.y.max() <= CLASSES

    gradient = jax.jit(jax.grad(lambda p: run(p, jax.random.key(0)).loss.mean()))(weights)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all()
        assert jnp.abs(leaf).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"
    _, again = result.rerun(partial(network, weights), result.t)
    np.testing.assert_allclose(again[-1], result.features[-1], rtol=1e-4, atol=1e-5)
    other = jax.jit(run)(weights, jax.random.key(1))
    assert jnp.any(other.noise != result.noise), "the noise does not depend on the key"


@pytest.mark.parametrize("make", [losses.make, lambda name: objectives.make(name, CLASSES)])
def test_an_unknown_name_lists_the_known_ones(make):
    with pytest.raises(ValueError, match=r"unknown name 'divercity'; .*known: "):
        make("divercity")

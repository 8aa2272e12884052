"""What every auxiliary loss and every objective keeps to, found by globbing: the contract of `api`, and its options."""

import inspect
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

import diversedit_jax
from diversedit_jax import losses, objectives, registry
from diversedit_jax.api import AuxLoss, Batch, Context, Forward, Objective, Params, Term
from diversedit_jax.diffusion import paths
from diversedit_jax.objectives import flow_matching

PACKAGE = Path(diversedit_jax.__file__).parent


def files(slot: str) -> list[str]:
    return sorted(path.stem for path in (PACKAGE / slot).glob("*.py") if not path.stem.startswith("_"))


PREDICTED = {"ddpm": 2 * 3}  # channels; 3, those of SHAPE, for the others
LOSSES, OBJECTIVES = files("losses"), files("objectives")
CLASSES, BATCH, TOKENS, WIDTH, DEPTH = 7, 8, 16, 24, 12
SHAPE, ENCODER_WIDTH = (4, 4, 3), 10
OPTIONS = {"reg": {"width": ENCODER_WIDTH}}

ROUNDING = {"rtol": 1e-5, "atol": 1e-7}  # the cosines of random features cancel: their mean is far below the terms


def batch(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, *SHAPE), dtype=np.float32)
    y = rng.integers(CLASSES, size=BATCH, dtype=np.int32)
    encoded, token = (rng.standard_normal((BATCH, *n, ENCODER_WIDTH), dtype=np.float32) for n in ((TOKENS,), ()))
    return jax.tree.map(jnp.asarray, {"x": x, "y": y, "features/dinov2": encoded, "token/dinov2": token})


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
    if token is None:
        return image, tuple(outputs)
    return (image, jnp.resize(out.mean(axis=1), token.shape)), tuple(outputs)


def params(channels: int = SHAPE[-1]):
    rng = np.random.default_rng(1)
    blocks = 0.2 * rng.standard_normal((DEPTH, WIDTH, WIDTH), dtype=np.float32)
    return {
        "blocks": list(jnp.asarray(blocks)),
        "out": jnp.asarray(0.1 * rng.standard_normal((WIDTH, channels), dtype=np.float32)),
    }


teacher = partial(network, params())


def forward(features) -> Forward:
    rng = np.random.default_rng(2)
    x, noise = (jnp.asarray(rng.standard_normal((BATCH, *SHAPE), dtype=np.float32)) for _ in range(2))
    t = jnp.linspace(0.05, 0.95, BATCH)
    x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
    y = batch()["y"]
    rerun = Partial(flow_matching.bound(flow_matching.run_at, paths.make("linear")), x, noise, y)
    return Forward(jnp.ones(BATCH), x, noise, t, x_t, y, features, metrics={}, rerun=rerun)


@pytest.mark.parametrize(("slot", "name"), [("losses", n) for n in LOSSES] + [("objectives", n) for n in OBJECTIVES])
def test_options_are_keywords_with_a_type_and_a_default(slot, name):
    assert name in registry.known(slot)
    make = registry.factory(slot, name)
    assert registry.options(make).keys() == inspect.signature(make).parameters.keys(), "an option is not keyword-only"
    for option, parameter in registry.options(make).items():
        assert parameter.annotation is not inspect.Parameter.empty, f"{slot}.{name}: {option} has no type"
        assert parameter.default is not inspect.Parameter.empty, f"{slot}.{name}: {option} has no default"
        assert f"{option}" in documentation(slot, name), f"{slot}.{name}: {option} is not in the file's docstrings"
    first = inspect.getdoc(inspect.getmodule(make)).splitlines()[0]
    assert len(first) > 20, f"{slot}.{name}: its first line says what it is"


def documentation(slot: str, name: str) -> str:
    return (PACKAGE / slot / f"{name}.py").read_text()


@pytest.mark.parametrize(("slot", "name"), [("losses", n) for n in LOSSES] + [("objectives", n) for n in OBJECTIVES])
def test_a_file_cites_its_paper(slot, name):
    module = inspect.getmodule(registry.factory(slot, name))
    assert re.search(r"arXiv\s+\d{4}\.\d{5}", module.__doc__), f"{slot}.{name}: no arXiv number in its docstring"


def init(loss: AuxLoss, key, whole: Forward, given: Batch) -> Params:
    return loss.init(key, whole, given) if loss.init else {}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_contract(name):
    loss = losses.make(name)
    assert isinstance(loss, AuxLoss)
    assert all(0 <= block <= DEPTH for block in loss.blocks)
    heads = jax.jit(lambda key: init(loss, key, forward(features()), batch()))(jax.random.key(0))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(heads)), "optimizers take floats"

    def apply(heads, features, teacher_params, batch, step, key):
        context = Context(key=key, step=step, params=heads, teacher=partial(network, teacher_params))
        term = loss.apply(forward(features), batch, context)
        assert isinstance(term, Term)
        return term.loss, (term.metrics, term.loss if term.full is None else term.full)

    images = {name: batch()[name] for name in ("x", *loss.reads)}  # what can be differentiated in
    arguments = heads, features(), params(), images, jnp.int32(100_000), jax.random.key(1)
    run = jax.jit(jax.value_and_grad(apply, argnums=(0, 1, 2, 3), has_aux=True))
    (value, (metrics, full)), (head_gradient, gradient, *constants) = run(*arguments)
    for scalar in (value, full):
        assert scalar.shape == ()
        assert scalar.dtype == jnp.float32
        assert jnp.isfinite(scalar)
    for label, metric in metrics.items():
        assert jnp.shape(metric) == (), f"metric {label} is not a scalar"
        assert jnp.isfinite(metric), f"metric {label} = {metric}"
    assert value == run(*arguments)[0][0], "not a function of its arguments"

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
    for what, tree in zip(("teacher", "batch"), constants, strict=True):
        for path, leaf in jax.tree.leaves_with_path(tree):
            assert not leaf.any(), f"a gradient reaches the {what}: {jax.tree_util.keystr(path)}"


@pytest.mark.parametrize("name", LOSSES)
def test_init_reads_shapes_only(name):
    loss = losses.make(name)
    whole, given = forward(features()), batch()
    begin = jax.jit(partial(init, loss))
    heads = begin(jax.random.key(0), whole, given)
    abstract = jax.eval_shape(lambda *shapes: init(loss, jax.random.key(0), *shapes), whole, given)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), heads) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    zeros = begin(jax.random.key(0), *jax.tree.map(jnp.zeros_like, (whole, given)))
    jax.tree.map(np.testing.assert_array_equal, heads, zeros)
    if heads:
        other = begin(jax.random.key(1), whole, given)
        assert any(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (heads, other)), strict=True))


def applied(name: str, **options):
    """(forward, batch, key) -> the loss, with heads that are drawn from a fixed key."""
    loss = losses.make(name, **options)

    def apply(whole, batch, key):
        heads = init(loss, jax.random.key(0), whole, batch)
        context = Context(key=key, step=jnp.int32(100_000), params=heads, teacher=teacher)
        return loss.apply(whole, batch, context).loss

    return jax.jit(apply)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_does_not_depend_on_the_number_of_devices(name):
    apply, arguments = applied(name), (forward(features()), batch())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("data")))
    one, eight = (apply(*where, jax.random.key(0)) for where in (arguments, shards))
    assert len(shards[0].features[1].sharding.device_set) == 8
    np.testing.assert_allclose(eight, one, **ROUNDING)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_couples_examples_has_groups(name):
    """The loss of examples one by one is a sum: what one half of the batch holds does not change the other's part."""
    apply, key = applied(name), jax.random.key(0)
    first, second = ((forward(features(seed)), batch(seed)) for seed in (0, 1))
    front = np.arange(BATCH) < BATCH // 2

    def mixed(front):
        return jax.tree.map(lambda a, b: jnp.where(front.reshape(-1, *[1] * (a.ndim - 1)), a, b), first, second)

    pure = apply(*first, key) + apply(*second, key)
    crossed = apply(*mixed(front), key) + apply(*mixed(~front), key)
    options = registry.options(registry.factory("losses", name))
    if np.isclose(pure, crossed, **ROUNDING):
        assert "groups" not in options, f"{name} couples no examples: groups would do nothing"
        return
    assert "groups" in options, f"{name} couples examples: it needs the option groups"
    halves = [jax.tree.map(lambda leaf, part=part: leaf[part], first) for part in (front, ~front)]
    apart = np.mean([apply(*half, key) for half in halves])
    np.testing.assert_allclose(applied(name, groups=2)(*first, key), apart, **ROUNDING)
    assert not np.isclose(apply(*first, key), apart, **ROUNDING)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_does_not_depend_on_the_order_of_the_batch(name):
    """Where a loss draws nothing per example. One that does is compared with itself under another key, and left out."""
    apply, arguments = applied(name), (forward(features()), batch())
    order = np.random.default_rng(4).permutation(BATCH)
    straight, other = (apply(*arguments, jax.random.key(key)) for key in (0, 1))
    if straight != other:
        pytest.skip(f"{name} draws with its key")
    shuffled = jax.tree.map(lambda leaf: leaf[order], arguments)
    np.testing.assert_allclose(apply(*shuffled, jax.random.key(0)), straight, **ROUNDING)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_keeps_the_contract(name):
    objective = objectives.make(name, **OPTIONS.get(name, {}))
    assert isinstance(objective, Objective)
    weights = params(PREDICTED.get(name, SHAPE[-1]))

    def run(params, key):
        def checked(x_t, t, y, **inputs):
            assert {name: value.shape[1:] for name, value in inputs.items()} == objective.inputs
            return network(params, x_t, t, y, **inputs)

        given = {name: batch()[name] for name in ("x", "y", *objective.reads)}
        return objective.apply(checked, given, Context(key, np.int32(CLASSES)))

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


@pytest.mark.parametrize("make", [losses.make, objectives.make])
def test_an_unknown_name_lists_the_known_ones(make):
    with pytest.raises(ValueError, match=r"unknown name 'divercity'; .*known: "):
        make("divercity")

"""The training step: one result on every mesh, accumulation, EMA and teacher, auxiliary losses, optimizer, metrics."""

import math
from functools import partial
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diversedit_jax import config as configs
from diversedit_jax import losses, models, objectives, sharding
from diversedit_jax.api import AuxLoss, Codec, Conditions, Model, Objective, Rows, Space, Term
from diversedit_jax.diffusion.paths import PATHS
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import dit
from diversedit_jax.objectives.flow_matching import regress
from diversedit_jax.training import optimizer as optim
from diversedit_jax.training.step import Components, initializer, started_from, train_step

SHAPE, CLASSES, BATCH = (4, 4, 2), 5, 16
CONDITIONS = Conditions.labels(CLASSES)
KEY, RUN_KEY = jax.random.key(0), jax.random.key(1)


def batch():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((BATCH, *SHAPE), dtype=np.float32), rng.integers(CLASSES, size=BATCH, dtype=np.int32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def small_model() -> Model:
    """A network of two matrices, for all that does not depend on the network: features[1] is its middle."""

    def init(key):
        keys = jax.random.split(key)
        return {"first": jax.random.normal(keys[0], (32, 32)) / 6, "second": jax.random.normal(keys[1], (32, 32)) / 6}

    def apply(params, x_t, t, y):
        x = x_t.reshape(len(x_t), 1, 32) + t[:, None, None]
        middle = jnp.tanh(x @ params["first"]) + 0.1 * y[:, None, None]
        return (middle @ params["second"]).reshape(x_t.shape), (x, middle)

    return Model(init, apply)


def parts(**changes) -> Components:
    """A small run: data as they are stored, no auxiliary losses, plain SGD."""
    return Components(
        model=small_model(),
        codec=Codec(dict, lambda frozen, batch, key: batch, None),
        objective=objectives.make("flow_matching"),
        losses={},
        optimizer=optax.sgd(0.1),
        ema_decay=0.9,
        null=CONDITIONS.null,
    )._replace(**changes)


def start(parts: Components):
    return jax.jit(initializer(parts, batch()))(KEY)


def step_of(parts: Components):
    return jax.jit(partial(train_step, parts))


def one_step(parts: Components, state=None, run_key=RUN_KEY):
    return step_of(parts)(start(parts) if state is None else state, {}, batch(), run_key)


def assert_close(found, wanted, message: str, rtol: float = 2e-5):
    """Equal up to float32 rounding, relative to the largest element of each array."""

    def compare(path, ours, theirs):
        scale = np.abs(np.asarray(theirs)).max() + 1e-12
        name = f"{message}: {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(
            np.asarray(ours) / scale, np.asarray(theirs) / scale, rtol=0, atol=rtol, err_msg=name
        )

    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree_util.tree_map_with_path(compare, found, wanted)


# --- Meshes.


def layout_of(data: int, fsdp: int, tensor: int = 1) -> sharding.Layout:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make(data=data, fsdp=fsdp, tensor=tensor, devices=devices).with_rules(dit.RULES)


def head() -> AuxLoss:
    """A loss with a projector, as REPA's, that reads the teacher too."""

    def init(key, forward, batch):
        width = forward.features[1].shape[-1]
        return {"kernel": jax.random.normal(key, (width, width))}

    def apply(forward, batch, context):
        wanted = context.teacher(forward.x_t, forward.t, forward.y)[1][-1].mean(axis=1, keepdims=True)
        found = forward.features[1] @ context.params["kernel"]
        value = jnp.mean(jnp.square(found - wanted)) + 0.1 * jax.random.normal(context.key)
        return Term(value, {"size": jnp.abs(found).mean()})

    return AuxLoss(apply, init, blocks=(1,))


def full_parts(unroll: bool = False) -> Components:
    """Everything together: the diffusion transformer, two auxiliary losses, AdamW."""
    size = {"depth": 4, "width": 64, "heads": 2, "mlp_ratio": 2.0}
    model = models.make("dit", Space(SHAPE, CONDITIONS), {}, (1,), skip="release", unroll=unroll, **size)
    aux = {"diversity": losses.make("diversity", groups=2), "head": head()}
    optimizer, _ = optim.make(10, eps=1e-3)  # the first step of Adam divides by |gradient|: rounding is not enlarged
    return parts(model=model, losses=aux, optimizer=optimizer)


def on(layout: sharding.Layout, unroll: bool = False):
    made = full_parts(unroll=unroll)
    init = initializer(made, batch())
    where = sharding.shardings(jax.eval_shape(init, KEY), layout)
    state = jax.jit(init, out_shardings=where)(KEY)
    shard = jax.device_put(batch(), sharding.over_batch(layout))
    out = (where, sharding.replicated(layout))
    step = jax.jit(partial(train_step, made), donate_argnums=0, out_shardings=out)
    with jax.set_mesh(layout.mesh):
        new, metrics = step(state, {}, shard, RUN_KEY)
    return where, state, new, metrics


@pytest.fixture(scope="module")
def on_one_device():
    return on(layout_of(1, 1))


@pytest.mark.parametrize(
    ("sizes", "unroll"),
    [
        pytest.param((8, 1, 1), False, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), False, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), False, marks=pytest.mark.slow),
        ((2, 2, 2), False),
        pytest.param((2, 2, 2), True, marks=pytest.mark.slow),
        pytest.param((4, 1, 2), False, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), True, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_step(on_one_device, sizes, unroll):
    """As the loop over blocks on one device, also without loop, as TPUs have it."""
    _, _, wanted, wanted_metrics = on_one_device
    layout = layout_of(*sizes)
    where, state, new, metrics = on(layout, unroll)
    assert_close(metrics, wanted_metrics, f"{sizes}: metrics")
    assert_close(new, wanted, f"{sizes}: state", rtol=1e-4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "the old state was not donated"

    def check(path, leaf, place):
        name = jax.tree_util.keystr(path)
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), f"{name} is {leaf.sharding}, wanted {place}"
        shard = leaf.addressable_shards[0].data.shape
        parts = [math.prod(layout.mesh.shape[axis] for axis in np.atleast_1d(axes or ())) for axes in place.spec]
        expected = tuple(n // k for n, k in zip_longest(leaf.shape, parts, fillvalue=1))
        assert shard == expected, f"{name}: {leaf.shape} has shards of {shard}"
        return math.prod(parts) > 1

    split = jax.tree_util.tree_map_with_path(check, new, where)
    large = [leaf.size >= sharding.SMALLEST for leaf in jax.tree.leaves(new["params"])]
    assert sum(jax.tree.leaves(split["params"])) >= (sum(large) if sizes[1] > 1 else 0)
    assert jax.tree.leaves(split["ema"]) == jax.tree.leaves(split["params"])
    moments = optax.tree.get(split["opt"], "mu")
    assert jax.tree.leaves(moments["params"]) == jax.tree.leaves(split["params"]), "moments live elsewhere"


# --- What is not finite.


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_leaves_no_trace(where):
    """But for the step, so that the next batch is another; and the run goes on as if the batch had not been."""

    def apply(forward, batch, context):
        x, now = forward.features[1].mean(), context.step == 1
        if where == "loss":
            return Term(jnp.where(now, jnp.nan, 0.0))
        return Term(jnp.sqrt(jnp.where(now, x - jax.lax.stop_gradient(x), 1.0)))  # of 0: its gradient is infinite

    optimizer, _ = optim.make(10)
    made = parts(losses={"bad": AuxLoss(apply)}, optimizer=optimizer)
    first, metrics = one_step(made)
    assert np.isfinite(metrics["grad_norm"])
    second, metrics = one_step(made, first)
    assert not np.isfinite(metrics["grad_norm" if where == "gradient" else "loss/total"])
    assert np.isfinite(metrics["loss/total"]) == (where == "gradient")
    assert int(second["step"]) == 2
    jax.tree.map(np.testing.assert_array_equal, second | {"step": 0}, first | {"step": 0})
    third, metrics = one_step(made, second)
    assert np.isfinite(metrics["loss/total"])
    assert not np.array_equal(third["params"]["first"], second["params"]["first"])


# --- Accumulation.


def deterministic(network, batch, context):
    """Flow matching with draws that depend on the example only, so that parts of a batch draw what the whole does."""
    x = batch["x"]
    t = jnp.clip(jnp.abs(x[:, 0, 0, 0]), 0.05, 0.95)
    return regress(network, PATHS["linear"], x, jnp.flip(x, axis=(1, 2)), t, batch["y"])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_equal_the_whole(accumulate):
    whole = parts(objective=Objective(deterministic))
    wanted, wanted_metrics = one_step(whole)
    new, metrics = one_step(whole._replace(accumulate=accumulate))
    assert_close(new, wanted, "state")
    assert_close(metrics, wanted_metrics, "metrics")


def test_accumulated_parts_draw_differently():
    """With noise drawn by key, parts draw anew: another estimate of the same gradient, never the same draws twice."""
    seen = []

    def objective(network, batch, context):
        forward = objectives.make("flow_matching").apply(network, batch, context)
        jax.debug.callback(lambda t, x: seen.append((np.asarray(t), np.asarray(x))), forward.t, forward.x)
        return forward

    state = start(parts(accumulate=4))
    step_of(parts(objective=Objective(objective), accumulate=4))(state, {}, batch(), RUN_KEY)
    jax.effects_barrier()
    assert len(seen) == 4
    assert len(np.unique([t for t, _ in seen])) == BATCH, "two parts drew the same times"
    alternate = {np.asarray(batch()["x"])[part::4].tobytes() for part in range(4)}  # each device keeps its examples
    assert {x.tobytes() for _, x in seen} == alternate
    used = np.concatenate([x for _, x in seen])
    assert sorted(x.tobytes() for x in used) == sorted(x.tobytes() for x in np.asarray(batch()["x"])), (
        "not each example once"
    )


# --- The state.


def test_state_at_the_start():
    state = start(full_parts())
    assert set(state) == {"step", "params", "ema", "losses", "objective", "memory", "ema_memory", "opt"}
    assert state["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["ema"], state["params"])
    assert state["losses"]["diversity"] == state["objective"] == state["memory"] == state["ema_memory"] == {}
    assert set(state["losses"]["head"]) == {"kernel"}
    keys = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert not keys, f"random state in the state: {keys}"
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {np.dtype("float32"), np.dtype("int32")}


def test_a_state_that_starts_from_given_parameters_averages_from_them():
    state = jax.device_put(start(parts()), sharding.replicated(layout_of(1, 1)))
    given = {"first": np.full((32, 32), 7, np.float32)}
    new = started_from(state, given)
    assert new.keys() == state.keys()
    wanted = {"first": given["first"], "second": state["params"]["second"]}
    for name in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, new[name], wanted)
    assert new["ema"]["first"] is not new["params"]["first"], "a step may donate one of them"


def test_ema_follows_the_formula_and_the_step_is_counted():
    made = parts()
    step, state = step_of(made), start(made)
    ema = state["ema"]
    for count in (1, 2, 3):
        state, _ = step(state, {}, batch(), RUN_KEY)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, state["params"])
        assert state["step"] == count
        assert_close(state["ema"], ema, f"EMA after {count} steps", rtol=1e-6)
    assert np.abs(state["ema"]["first"] - state["params"]["first"]).max() > 1e-5


def test_no_key_of_a_step_is_used_twice():
    """The objective's draws, the codec's and those of two losses, found by jax's own check of keys."""

    def encode(frozen, batch, key):
        return batch | {"x": batch["x"] + jax.random.normal(key, batch["x"].shape)}

    made = parts(codec=Codec(dict, encode, None), losses={"one": head(), "two": head()})
    with jax.debug_key_reuse(True):
        state = jax.eval_shape(initializer(made, batch()), KEY)
        jax.eval_shape(partial(train_step, made), state, {}, batch(), RUN_KEY)


def test_every_step_draws_anew_and_the_same_when_repeated():
    made = parts(optimizer=optax.sgd(0.0))  # the parameters stand still, so that only the draws differ
    step, state = step_of(made), start(made)
    first, metrics = step(state, {}, batch(), RUN_KEY)
    again, same = step(state, {}, batch(), RUN_KEY)
    jax.tree.map(np.testing.assert_array_equal, (first, metrics), (again, same))
    _, second = step(first, {}, batch(), RUN_KEY)
    _, other = step(state, {}, batch(), jax.random.key(2))
    assert len({float(m["loss/total"]) for m in (metrics, second, other)}) == 3


# --- Auxiliary losses.


def test_the_teacher_is_the_ema_network_and_gets_no_gradient():
    def apply(forward, batch, context):
        prediction, features = context.teacher(forward.x_t, forward.t, forward.y)
        return Term(10 * jnp.sum(prediction**2) + jnp.sum(features[1] ** 2))

    made = parts(losses={"taught": AuxLoss(apply)})
    state = start(made)
    state["ema"] = jax.tree.map(lambda p: 2 * p + 0.1, state["params"])
    new, metrics = one_step(made, state)
    plain, _ = one_step(parts(), state)
    assert_close(new["params"], plain["params"], "a loss on the teacher alone moves the parameters", rtol=1e-7)
    assert_close(new["ema"], plain["ema"], "a loss on the teacher alone moves the EMA", rtol=1e-7)
    as_params, other = one_step(made, state | {"ema": state["params"]})
    assert metrics["loss/taught"] != other["loss/taught"], "the teacher does not have the EMA's weights"
    assert_close(as_params["params"], new["params"], "parameters", rtol=1e-7)


def test_heads_are_trained_and_stay_out_of_the_model():
    made = parts(losses={"head": head()})
    state = start(made)
    new, metrics = one_step(made, state)
    assert set(new["params"]) == set(new["ema"]) == {"first", "second"}
    assert np.abs(new["losses"]["head"]["kernel"] - state["losses"]["head"]["kernel"]).max() > 1e-4
    assert np.abs(new["params"]["first"] - one_step(parts(), state | {"losses": {}})[0]["params"]["first"]).max() > 1e-6
    assert metrics["loss/total"] == metrics["loss/objective"] + metrics["loss/head"]


def test_two_losses_start_and_draw_differently():
    twins = parts(losses={"one": head(), "two": head()})
    state = start(twins)
    one, two = (state["losses"][label]["kernel"] for label in ("one", "two"))
    assert np.abs(one - two).max() > 0.1, "two heads start with the same weights"
    state["losses"]["two"] = state["losses"]["one"]
    _, metrics = one_step(twins, state)
    assert metrics["loss/one"] != metrics["loss/two"], "two losses draw with one key"
    assert metrics["one/size"] == metrics["two/size"]


def test_losses_see_the_step():
    seen = parts(losses={"seen": AuxLoss(lambda f, b, context: Term(0.0 * context.step, {"step": context.step}))})
    state = start(seen)
    for count in (0, 1):
        state, metrics = one_step(seen, state)
        assert metrics["seen/step"] == count


def test_metrics():
    _, metrics = one_step(parts(losses={"head": head(), "diversity": losses.make("diversity")}, model=two_blocks()))
    terms = ("orthogonality", "mutual_information", "dispersion", "loss", "weight")
    names = {"loss/total", "loss/objective", "loss/head", "loss/diversity", "head/size", "grad_norm"}
    assert set(metrics) == names | {f"diversity/{term}" for term in terms}
    assert all(value.shape == () for value in metrics.values())
    total = sum(metrics[f"loss/{name}"] for name in ("objective", "head", "diversity"))
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-6)


def two_blocks() -> Model:
    small = small_model()

    def apply(params, *inputs):
        out, (x, middle) = small.apply(params, *inputs)
        return out, (x, middle, 2 * middle + x)

    return Model(small.init, apply)


def test_gradient_norm_is_that_before_clipping():
    _, free = one_step(parts(optimizer=optax.sgd(1.0)))
    clipped = parts(optimizer=optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)))
    state = start(clipped)
    new, metrics = one_step(clipped, state)
    np.testing.assert_allclose(metrics["grad_norm"], free["grad_norm"], rtol=1e-6)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state["params"], new["params"]))
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_the_codec_gets_the_frozen_weights_and_a_key():
    def encode(frozen, batch, key):
        return {"x": frozen["scale"] * batch["x"] + jax.random.normal(key, batch["x"].shape), "y": batch["y"]}

    def objective(network, batch, context):
        forward = deterministic(network, batch, context)
        return forward._replace(metrics={"spread": batch["x"].std()})

    made = parts(codec=Codec(lambda: {"scale": jnp.zeros(())}, encode, None), objective=Objective(objective))
    state, step = start(made), step_of(made)
    spread = [step(state, {"scale": jnp.float32(s)}, batch(), RUN_KEY)[1]["spread"] for s in (0, 3)]
    np.testing.assert_allclose(spread, [1, 10**0.5], rtol=0.1)


# --- The optimizer.


def test_schedules():
    def rates(**options):
        _, rate = optim.make(100, learning_rate=2e-3, **options)
        return [float(rate(step)) for step in (0, 1, 5, 9, 10, 55, 100, 150)]

    np.testing.assert_allclose(rates(), 8 * [2e-3])
    warm = [0.2e-3, 0.38e-3, 1.1e-3, 1.82e-3]
    np.testing.assert_allclose(rates(warmup_steps=10), [*warm, 2e-3, 2e-3, 2e-3, 2e-3], rtol=1e-5)
    np.testing.assert_allclose(rates(warmup_steps=10, decay="cosine"), [*warm, 2e-3, 1e-3, 0, 0], rtol=1e-5, atol=1e-10)
    cosine = [1e-3 * (1 + np.cos(np.pi * min(step, 100) / 100)) for step in (0, 1, 5, 9, 10, 55, 100, 150)]
    np.testing.assert_allclose(rates(decay="cosine"), cosine, rtol=1e-4, atol=1e-9)


def test_adamw_with_clipping():
    """The first step of Adam moves by the learning rate times the sign, whatever the gradient's size; then decay."""
    params, grads = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([30.0, -40.0])}
    optimizer, _ = optim.make(10, learning_rate=0.1, weight_decay=0.5)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 - 0.05, 0.1 + 0.1], rtol=1e-5)

    for clip, wanted in [(1.0, [0.6, -0.8]), (None, [30, -40]), (100.0, [30, -40])]:
        optimizer, _ = optim.make(10, clip=clip, b1=0.0)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        mu = optax.tree.get(state, "mu")["w"]
        np.testing.assert_allclose(mu, wanted, rtol=1e-5, err_msg=f"clip {clip}")


def test_adamw_by_hand():
    """Two steps with settings of which none is the default."""
    b1, b2, eps, rate, decay = 0.5, 0.75, 0.1, 0.01, 0.2
    optimizer, _ = optim.make(10, learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip=None)
    params, m, v = {"w": jnp.array([1.0, -2.0])}, 0, 0
    state = optimizer.init(params)
    for count, gradient in enumerate(np.array([[0.3, -0.1], [-0.2, 0.4]]), 1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        unit = m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps)
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        np.testing.assert_allclose(updates["w"], -rate * (unit + decay * params["w"]), rtol=1e-5)
        params = optax.apply_updates(params, updates)


def test_groups_have_optimizers_of_their_own():
    """The first group that fits takes a parameter. The first step of Adam moves it by the group's learning rate."""
    trained = {
        "params": {"stem": jnp.ones(2), "deep": jnp.ones(2), "out": jnp.ones(2)},
        "losses": {"head": jnp.ones(2)},
    }
    rates = {"heads": ("losses/", 0.3), "deep": ("deep", 0.2), "rest": ("e", 0.5)}
    groups = {label: {"of": of, "learning_rate": rate} for label, (of, rate) in rates.items()}
    groups["rest"]["warmup_steps"] = 10
    made = optim.grouped(10, {"learning_rate": 0.1}, groups)
    found = {label: float(rate(0)) for label, rate in made.rates.items()}
    assert found == pytest.approx({"main": 0.1, "heads": 0.3, "deep": 0.2, "rest": 0.05})
    updates, _ = made.transform.update(trained, made.transform.init(trained), trained)
    moved = {name: -float(leaf[0]) for name, leaf in sharding.by_name(updates).items()}
    wanted = {"params/stem": 0.05, "params/deep": 0.2, "params/out": 0.1, "losses/head": 0.3}
    assert moved == pytest.approx(wanted, rel=1e-5)
    late = optim.grouped(10, {}, {"all": {"of": "params"}, "deep": groups["deep"]})
    with pytest.raises(ConfigError, match=r"config\.groups\.deep: no parameter's name fits 'deep'"):
        late.transform.init(trained)


def test_a_rate_of_zero_freezes_to_the_bit_and_needs_no_moments():
    """The EMA stays, too: the usual form of an average would move it by a rounding at every step."""
    frozen = {"old": {"of": "^params/first", "learning_rate": 0.0}}
    made = parts(optimizer=optim.grouped(10, {"learning_rate": 0.1}, frozen).transform, ema_decay=0.9999)
    state, step = start(made), step_of(made)
    begin = jax.device_get(state)
    assert not [name for name in sharding.by_name(state["opt"]) if "first" in name]
    for _ in range(20):
        state, _ = step(state, made.codec.init(), batch(), RUN_KEY)
    for name in ("params", "ema"):
        np.testing.assert_array_equal(state[name]["first"], begin[name]["first"])
        assert np.abs(state[name]["second"] - begin[name]["second"]).max() > 1e-4
    with pytest.raises(ConfigError, match=r"config\.optim\.learning_rate = 0\.0: .* nothing would be trained"):
        optim.grouped(10, {"learning_rate": 0.0}, frozen)


def test_a_start_may_give_single_rows_of_arrays_that_are_split():
    layout = layout_of(2, 4)
    params = {"a": {"w": jnp.zeros((8, 64, 16))}, "b": {"w": jnp.ones((64, 64))}}
    placed = jax.tree.map(jax.device_put, params, sharding.shardings(params, layout))
    rows = Rows((1, 6), np.arange(2 * 64 * 16, dtype=np.float32).reshape(2, 64, 16), 8)
    found = started_from({"params": placed}, {"a": {"w": rows}})
    wanted = np.zeros((8, 64, 16))
    wanted[[1, 6]] = rows.values
    for entry in ("params", "ema"):
        np.testing.assert_array_equal(found[entry]["a"]["w"], wanted)
        np.testing.assert_array_equal(found[entry]["b"]["w"], 1)
        assert found[entry]["a"]["w"].sharding == placed["a"]["w"].sharding
    assert rows.shape == (8, 64, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "cosin"}, r"decay = 'cosin' is unknown; did you mean 'cosine'"),
        ({"learning_rate": -1.0}, r"learning_rate = -1.0: must be at least 0"),
        ({"learning_rate": float("nan")}, r"learning_rate = nan: must be at least 0"),
        ({"eps": 0.0}, r"eps = 0.0: must be more than 0"),
        ({"clip": 0.0}, r"clip = 0.0: must be more than 0"),
        ({"b1": 1.0}, r"b1 = 1.0: must be at least 0 and less than 1"),
        ({"b2": -0.1}, r"b2 = -0.1: must be at least 0 and less than 1"),
        ({"weight_decay": -1.0}, r"weight_decay = -1.0: must be at least 0"),
        ({"warmup_steps": -1}, r"warmup_steps = -1: must be at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_optimizer_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        optim.make(10, **options)


def test_a_loss_from_a_file_outside_of_the_package(tmp_path, monkeypatch):
    """A config names it by its path; its options and their defaults are those of its signature."""
    (tmp_path / "their_loss.py").write_text(
        "import jax.numpy as jnp\n"
        "from diversedit_jax.api import AuxLoss, Term\n\n\n"
        "def make(*, scale: float = 0.5, block: int = 1):\n"
        "    def apply(forward, batch, context):\n"
        "        size = jnp.mean(forward.features[block] ** 2)\n"
        "        return Term(scale * size, {'size': size})\n\n"
        "    return AuxLoss(apply, blocks=(block,))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = configs.slot("losses", "their_loss:make", scale=3.0)
    assert config.block == 1
    theirs = configs.make("losses", config, "config.losses.theirs")
    new, metrics = one_step(parts(losses={"theirs": theirs}))
    assert metrics["loss/theirs"] == pytest.approx(3 * float(metrics["theirs/size"]), rel=1e-6)
    assert np.abs(new["params"]["first"] - one_step(parts())[0]["params"]["first"]).max() > 1e-4
    with pytest.raises(ConfigError, match=r"cannot load 'their_loss:make_it'"):
        configs.slot("losses", "their_loss:make_it")

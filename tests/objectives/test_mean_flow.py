"""MeanFlow: the reference's numbers, the identity that it regresses, what is drawn, and what gradients reach."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import models, objectives
from diversedit_jax.api import Conditions, Context, Space
from diversedit_jax.diffusion import guidance, solvers
from diversedit_jax.errors import ConfigError
from diversedit_jax.models.dit import REMAT
from diversedit_jax.objectives import mean_flow
from diversedit_jax.weights import dit as releases
from tests import reference

# --- The reference's numbers.

NULL = np.int32(1000)
UNGUIDED, KAPPA = {"omega": 1.0, "kappa": 0.0}, {"omega": 1.0, "kappa": 0.5, "interval": (0.0, 0.75)}
CASES = {
    "raw_nocfg": UNGUIDED | {"power": 0.0},
    "raw_cfg_kappa": KAPPA | {"power": 0.0},
    "nocfg": UNGUIDED,
    "cfg_kappa0": {"omega": 2.0, "kappa": 0.0},
    "cfg_kappa": KAPPA,
}


@cache
def golden():
    """The reference's network and numbers."""
    release, _ = releases.open_release(reference.DATA / "meanflow.safetensors", heads=4)
    model = models.make(
        "dit", release.space((8, 8)), releases.inputs(release.arch), **releases.model_options(release.arch)
    )
    with np.load(reference.DATA / "meanflow.npz") as file:
        gold = {key: jnp.asarray(file[key], jax.dtypes.canonicalize_dtype(file[key].dtype)) for key in file.files}
    return model, release.params, gold


# By default those with the loss's weight; what it weighs is that of the definition, below.
SLOW = {"raw_nocfg", "raw_cfg_kappa", "cfg_kappa0"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_loss_and_gradient_equal_the_references(case):
    model, params, gold = golden()

    def run(params):
        arguments = gold["lat_nhwc"], gold["noise_nhwc"], gold["t"], gold["r"], gold["y"], jnp.arange(4) < 1, NULL
        forward = mean_flow.regress(model.network(params), *arguments, **CASES[case])
        return forward.loss.mean(), forward.metrics

    def norm(gradient):
        return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))

    (value, metrics), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    np.testing.assert_allclose(value, gold[f"{case}_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["v_loss"], gold[f"{case}_v_loss"].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["raw"], gold.get(f"raw_{case}_loss", metrics["raw"]), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(norm)(gradient), gold[f"{case}_grad_norm"], rtol=1e-4)


def test_one_step_equals_the_references():
    model, params, gold = golden()

    def average(x, t, span):
        return guidance.over_span(model.network(params), span)(x, jnp.full(len(x), t), gold["sample_y"])[0]

    found = jax.jit(lambda z: solvers.mean_flow(average, z, solvers.uniform_times(1)))(gold["z_nhwc"])
    np.testing.assert_allclose(found, gold["one_step"], atol=1e-5 * np.abs(gold["one_step"]).max())


# --- What is regressed, with a network small enough to be written down.

CLASSES, SHAPE, BATCH = 7, (4, 6, 2), 8


def small(weights, x_t, t, y, *, span):
    """A network whose prediction depends on all that it is given."""
    t, y, span = (a[:, None, None, None] for a in (t, y, span))
    hidden = jnp.tanh(x_t @ weights[0] + jnp.sin(3 * t) + 0.1 * y)
    return hidden @ weights[1] * (1 + jnp.cos(2 * span)), (hidden.reshape(len(hidden), -1, 2),)


def weights():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2)))


def examples():
    """(x, noise, t, r, y, dropped, null)"""
    rng = np.random.default_rng(1)
    x, noise = (jnp.asarray(rng.standard_normal((BATCH, *SHAPE))) for _ in range(2))
    t = jnp.linspace(0.3, 0.9, BATCH)
    return (
        x,
        noise,
        t,
        t * jnp.linspace(0, 1, BATCH),
        jnp.arange(BATCH) % CLASSES,
        jnp.arange(BATCH) < 2,
        np.int32(CLASSES),
    )


def regress(weights, **options):
    return mean_flow.regress(partial(small, weights), *examples(), **options)


def by_definition(w, omega: float, kappa: float, interval: tuple[float, float]):
    """(u, its target) from the paper's equations, the derivative along the flow by finite differences."""
    x, noise, t, r, y, dropped, null = examples()
    network, h, over = partial(small, w), 1e-5, lambda a: a[:, None, None, None]
    x_t, v = (1 - over(t)) * x + over(t) * noise, noise - x
    u_null, u_y = (network(x_t, t, labels, span=jnp.zeros(BATCH))[0] for labels in (jnp.full(BATCH, null), y))
    kept = (t >= interval[0]) & (t <= interval[1]) & ~dropped
    guided = jnp.where(over(kept), omega * v + (1 - omega - kappa) * u_null + kappa * u_y, v)
    labels = jnp.where(dropped, null, y)
    ends = [network(x_t + s * guided, t + s, labels, span=t + s - r)[0] for s in (-h, h)]
    target = guided - over(t - r) * (ends[1] - ends[0]) / (2 * h)
    return network(x_t, t, labels, span=t - r)[0], target


GUIDED = {"omega": 0.8, "kappa": 0.3, "interval": (0.4, 0.8)}


@pytest.mark.parametrize(("power", "eps"), [(0.0, 0.01), (0.5, 10.0), (1.0, 0.01)])
def test_loss_and_gradient_are_those_of_the_definition(power, eps):
    """The target and the weight's denominator are numbers: gradients pass through the prediction alone."""
    with jax.enable_x64(True):
        x, noise, *_ = examples()
        u, target = jax.jit(partial(by_definition, **GUIDED))(weights())
        denominator = (((u - target) ** 2).sum((1, 2, 3)) + eps) ** power

        def wanted(w):
            error = ((by_definition(w, **GUIDED)[0] - target) ** 2).sum((1, 2, 3))
            return (error / denominator).sum(), error

        def found(w):
            forward = regress(w, power=power, eps=eps, **GUIDED)
            return forward.loss.sum(), forward

        (value, error), gradient = jax.jit(jax.value_and_grad(wanted, has_aux=True))(weights())
        (given, forward), given_gradient = jax.jit(jax.value_and_grad(found, has_aux=True))(weights())
        np.testing.assert_allclose(given, value, rtol=1e-7)
        np.testing.assert_allclose(given_gradient, gradient, rtol=1e-6)
        np.testing.assert_allclose(forward.metrics["raw"], error.mean(), rtol=1e-7)
        np.testing.assert_allclose(forward.metrics["v_loss"], ((u - noise + x) ** 2).sum((1, 2, 3)).mean(), rtol=1e-7)


@pytest.mark.parametrize("options", [UNGUIDED, KAPPA])
def test_a_network_with_other_channels_is_refused(options):
    def network(x_t, t, y, *, span):
        return jnp.tile(x_t, 2), (x_t,)

    with pytest.raises(ConfigError, match=r"predicts \(4, 6, 4\), but MeanFlow needs \(4, 6, 2\)"):
        jax.eval_shape(lambda: mean_flow.regress(network, *examples(), **options))


def test_passes_that_count_nothing_are_not_made():
    calls = []

    def network(x_t, t, y, *, span):
        calls.append(y)
        return small(weights(), x_t, t, y, span=span)

    halves = {"omega": 0.5, "kappa": 0.5}
    for options, passes in [(UNGUIDED, 1), ({"omega": 2.0, "kappa": 0.0}, 2), (halves, 2), (KAPPA, 3)]:
        calls.clear()
        jax.eval_shape(lambda options=options: mean_flow.regress(network, *examples(), **options))
        assert len(calls) == passes, options


def test_a_pass_is_run_again_at_other_times():
    x, noise, t, r, *_ = examples()
    forward, other = regress(weights()), t - 0.25
    assert ((other < r) & (r < t)).any(), "an example whose span would be negative"
    prediction, features = forward.rerun(partial(small, 2 * weights()), other)
    x_t = (1 - other)[:, None, None, None] * x + other[:, None, None, None] * noise
    wanted = small(2 * weights(), x_t, other, forward.y, span=jnp.where(other > r, other - r, 0))
    np.testing.assert_allclose(prediction, wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features[0], wanted[1][0], rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(forward.rerun) == jax.tree.structure(regress(weights()).rerun)


OTHERS = sorted(REMAT.keys() - {"named", "none"})


@cache
def model_gradient(remat: str, cuts: tuple[int, ...]):
    """The gradient of the loss and of all features of a DiverseDiT."""
    options = {"depth": 4, "width": 16, "heads": 2, "mlp_ratio": 2.0, "skip": "release"}
    space = Space(SHAPE, Conditions.labels(CLASSES))
    model = models.make("dit", space, {"span": ()}, cuts, remat=remat, **options)
    rng = np.random.default_rng(2)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), abstract)

    def loss(params):
        forward = mean_flow.regress(model.network(params), *examples(), omega=1.0, kappa=0.0)
        return forward.loss.mean() + sum(jnp.mean(f**2) for f in forward.features)

    return jax.device_get(jax.jit(jax.grad(loss))(params))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["named", *OTHERS])
def test_every_remat_policy_gives_the_same_gradient(remat):
    def compare(path, found, wanted):
        scale = np.abs(wanted).max()
        assert scale > 0
        np.testing.assert_allclose(found / scale, wanted / scale, atol=2e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(compare, model_gradient(remat, (3,)), model_gradient("none", ()))


# --- What is drawn.

COUNT = 20_000


def draw(b: int = COUNT, seed: int = 0, **options):
    """(t, r, dropped) of a batch of b."""
    seen = {}

    def network(x_t, t, y, *, span):
        seen.update(t=t, span=span, y=y)
        return x_t, (x_t.reshape(len(x_t), 1, -1),)

    batch = {"x": jnp.ones((b, 1, 1, 1)), "y": jnp.zeros(b, int)}
    objective = objectives.make("mean_flow", omega=1.0, kappa=0.0, **options)
    forward = objective.apply(network, batch, Context(jax.random.key(seed), np.int32(CLASSES)))
    t = np.asarray(forward.t)
    r = np.asarray(forward.rerun(lambda x_t, t, y, *, span: (t - span, ()), forward.t)[0])
    return t, r, np.asarray(forward.y == CLASSES)


def test_times_are_the_later_and_earlier_of_two_logit_normals():
    t, r, _ = draw(equal=0.0)
    assert (r < t).all()
    logits = np.log(np.concatenate([t, r]) / (1 - np.concatenate([t, r])))
    assert abs(logits.mean() + 0.4) < 4 / (2 * COUNT) ** 0.5
    assert abs(logits.std() - 1) < 4 / (4 * COUNT) ** 0.5
    # of two independent standard normals the greater has the mean 1 / sqrt(pi)
    assert abs(logits[:COUNT].mean() + 0.4 - np.pi**-0.5) < 4 / COUNT**0.5


@pytest.mark.parametrize("groups", [1, 8])
def test_the_first_of_each_group_have_equal_times_and_no_label(groups):
    t, r, dropped = (a.reshape(groups, -1) for a in draw(groups=groups))
    n = COUNT // groups
    np.testing.assert_allclose(t[:, : int(0.75 * n)], r[:, : int(0.75 * n)], rtol=1e-6)
    assert (t[:, int(0.75 * n) :] > r[:, int(0.75 * n) :]).all()
    number = dropped.sum(axis=1)
    assert (np.sort(dropped, axis=1)[:, ::-1] == dropped).all(), "not the first"
    assert (abs(number - 0.1 * n) < 4 * (0.09 * n) ** 0.5).all()
    if groups > 1:
        assert len(set(number)) > 1, "every group draws its own number"


def test_independent_draws_leave_the_order_alone():
    t, r, dropped = draw(positional=False, drop="independent")
    equal = t - r < 1e-6
    for found, portion in ((equal, 0.75), (dropped, 0.1), (equal & dropped, 0.075)):
        assert abs(found.mean() - portion) < 4 * (portion * (1 - portion) / COUNT) ** 0.5
        assert abs(found[: COUNT // 4].mean() - portion) < 8 * (portion * (1 - portion) / COUNT) ** 0.5


def test_the_options_of_the_loss_reach_it():
    options = {"omega": 0.8, "kappa": 0.3, "power": 0.5, "eps": 10.0}
    objective = objectives.make("mean_flow", guidance_interval=(0.3, 0.5), equal=0.0, **options)
    batch = {"x": jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, *SHAPE))), "y": jnp.arange(BATCH)}
    network = partial(small, weights())
    forward = objective.apply(network, batch, Context(jax.random.key(0), np.int32(BATCH)))
    r = forward.t - forward.rerun(lambda x_t, t, y, *, span: (span, ()), forward.t)[0]
    given = forward.x, forward.noise, forward.t, r, batch["y"], forward.y == BATCH, np.int32(BATCH)
    wanted = mean_flow.regress(network, *given, interval=(0.3, 0.5), **options)
    np.testing.assert_allclose(forward.loss, wanted.loss, rtol=1e-4)


def test_half_an_example_does_not_count_and_groups_are_of_training():
    t, r, _ = draw(6)
    assert (t - r < 1e-6).tolist() == 4 * [True] + 2 * [False], "not the first floor(0.75 * 6)"
    batch = {"x": jnp.ones((6, 1, 1, 1)), "y": jnp.zeros(6, int)}
    context = Context(jax.random.key(0), np.int32(CLASSES), training=False)
    objective = objectives.make("mean_flow", omega=1.0, kappa=0.0, groups=4, condition_drop=1.0)
    forward = objective.apply(lambda x_t, t, y, *, span: (x_t, ()), batch, context)
    assert not forward.y.any(), "a label is dropped where nobody learns"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equal": 1.5}, r"equal = 1.5: must be at least 0 and at most 1"),
        ({"condition_drop": -0.1}, r"condition_drop = -0.1: must be at least 0 and at most 1"),
        ({"drop": "fist"}, r"drop = 'fist' is unknown; did you mean 'first'"),
        ({"groups": 0}, r"groups = 0: must be at least 1"),
        (
            {"guidance_interval": (0.5, 0.2)},
            r"guidance_interval = \(0.5, 0.2\): must be two times with 0 <= lo <= hi <= 1",
        ),
        ({"kappa": 1.0}, r"kappa = 1.0: must be at least 0 and less than 1"),
        ({"eps": 0.0}, r"eps = 0.0: must be more than 0"),
        ({"time": "logitnormal"}, r"time = 'logitnormal' is unknown; did you mean 'logit_normal'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        objectives.make("mean_flow", **options)


def test_a_batch_that_groups_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="groups = 4 must divide the batch of 10"):
        draw(10, groups=4)


# --- Sampling.


def test_sampling_by_the_true_average_velocity_is_exact_in_any_steps():
    """For data N(0, s^2) the flow scales x by the standard deviation of x_t."""
    with jax.enable_x64(True):
        s, z = 0.4, jnp.asarray(np.random.default_rng(0).standard_normal((2, *SHAPE)))
        deviation = lambda t: jnp.sqrt((1 - t) ** 2 * s**2 + t**2)  # noqa: E731

        def average(x, t, span):
            return x * (1 - deviation(t - span) / deviation(t)) / span

        for steps in (1, 2, 7):
            found = solvers.mean_flow(average, z, solvers.uniform_times(steps))
            np.testing.assert_allclose(found, s * z, rtol=1e-12)

"""From trained networks to images: every solver on what it can sample, wrong combinations refused before compiling."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import codecs, models, objectives, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Conditions, Model, Objective, Space
from diversedit_jax.configs import default
from diversedit_jax.data import pipeline
from diversedit_jax.diffusion import discrete, solve
from diversedit_jax.diffusion.paths import PATHS
from diversedit_jax.diffusion.predictions import AverageVelocity, Diffusion, Flow
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.runs import build
from diversedit_jax.sampling import sampler as sampling
from diversedit_jax.training.step import initializer, train_step

SHAPE, CLASSES = (8, 8, 2), 3
SPACE = Space(SHAPE, Conditions.labels(CLASSES))
DIFFUSION = Diffusion(discrete.linear(1000))
PIXELS = codecs.make("pixels")._replace(decode=None)


def trained(predicts, learns_null=True):
    """An objective, as far as sampling reads it."""
    return Objective(None, predicts, learns_null=learns_null)


def sampler(predicts, model=None, **options):
    model = model or models.make("dit", SPACE, depth=2, width=16, heads=2)
    sample = sampling.make(model, PIXELS, SPACE, trained(predicts), sharding.make(), batch_size=8, **options)
    return lambda seed=0: sample(model.init(jax.random.key(0)), {}, np.arange(8) % CLASSES, seed)


def average(output):
    """A model without parameters, whose average velocity is a function of (x, t, span)."""

    def apply(params, x, t, y, *, span):
        return output(x, t[:, None, None, None], span[:, None, None, None]), ()

    return Model(lambda key: {}, apply)


def still(output):
    """A model without parameters, whose prediction is a function of (x, t)."""
    return Model(lambda key: {}, lambda params, x, t, y: (output(x, t[:, None, None, None]), ()))


FLOWS = [
    ("linear", "velocity", {"solver": "dopri5"}),
    ("linear", "velocity", {"solver": "euler_maruyama", "diffusion": "sbdm"}),
    ("linear", "noise", {"solver": "heun"}),
    ("cosine", "score", {"solver": "euler_maruyama", "last_step_kind": "tweedie"}),
    ("cosine", "velocity", {"solver": "sde_heun", "last_step_kind": "none"}),
    ("vp", "velocity", {"solver": "euler"}),
    ("vp", "noise", {"solver": "sde_heun", "diffusion": "linear", "cfg_scale": 2.0}),
    ("vp", "noise", {"solver": "dpm_solver_pp", "cfg_scale": 2.0}),
    ("vp", "score", {"solver": "euler_maruyama", "diffusion": "increasing_decreasing", "last_step_kind": "euler"}),
]


@pytest.mark.parametrize(("path", "prediction", "options"), FLOWS)
def test_data_of_unit_variance_stay_so(path, prediction, options):
    """For data N(0, 1) on a variance-preserving path v = 0; on the linear one v = (2 t - 1) / ((1 - t)^2 + t^2) x."""

    def output(x, t):
        variance = (1 - t) ** 2 + t**2 if path == "linear" else jnp.ones_like(t)
        if prediction == "velocity":
            return (2 * t - 1) / variance * x if path == "linear" else 0 * x
        score = -x / variance
        return score if prediction == "score" else -PATHS[path].sigma(t) * score

    x = sampler(Flow(PATHS[path], prediction), still(output), steps=200, **options)()
    assert x.shape == (8, *SHAPE)
    assert abs(x.mean()) < 4 / x.size**0.5
    assert abs(x.std() - 1) < 4 / (2 * x.size) ** 0.5 + 0.02
    again = sampler(Flow(PATHS[path], prediction), still(output), steps=200, **options)
    np.testing.assert_array_equal(x, again())
    assert (x != again(seed=1)).any()


AVERAGES = [
    {"solver": "mean_flow", "steps": 1},
    {"solver": "mean_flow", "steps": 3, "cfg_scale": 2.0},
    {"solver": "heun", "steps": 50, "cfg_scale": 2.0},
    {"solver": "dopri5", "steps": 200},
    {"solver": "euler_maruyama", "steps": 200},
]


@pytest.mark.parametrize("options", AVERAGES, ids=lambda options: "-".join(map(str, options.values())))
def test_average_velocities_are_sampled(options):
    """For data N(0, 1) the flow scales x by the deviation of x_t; at span 0 the average velocity is the velocity."""

    def output(x, t, span):
        now, then = ((1 - a) ** 2 + a**2 for a in (t, t - span))
        safe = jnp.where(span > 0, span, 1)
        return x * jnp.where(span > 0, (1 - jnp.sqrt(then / now)) / safe, (2 * t - 1) / now)

    x = sampler(AverageVelocity(), average(output), **options)()
    assert abs(x.mean()) < 4 / x.size**0.5
    assert abs(x.std() - 1) < 4 / (2 * x.size) ** 0.5 + 0.02
    noise = sampler(AverageVelocity(), average(lambda x, t, span: 0 * x), solver="mean_flow", steps=1)()
    if options["solver"] != "euler_maruyama":  # the flow returns to the deviation where it started
        np.testing.assert_allclose(x, noise, atol=1e-5 if options["solver"] == "mean_flow" else 5e-3)


def test_guidance_of_the_average_velocity():
    """u_null + s (u - u_null), with u = y and the null label's 3: 3 + 2 (y - 3), in one step and in four."""
    model = Model(lambda key: {}, lambda params, x, t, y, *, span: (0 * x + y[:, None, None, None], ()))
    labels, make = np.arange(8) % CLASSES, partial(sampler, AverageVelocity(), model, solver="mean_flow")
    plain, wanted = make(steps=1)(), (3 + 2 * (labels - 3) - labels)[:, None, None, None]
    for steps in (1, 4):
        np.testing.assert_allclose(plain - make(steps=steps, cfg_scale=2.0)(), wanted + 0 * plain, atol=1e-5)
    # the first of four steps lies outside of the interval: a quarter of the way without guidance
    partly = make(steps=4, cfg_scale=2.0, guidance_interval=(0.0, 0.9))()
    np.testing.assert_allclose(plain - partly, 0.75 * wanted + 0 * plain, atol=1e-5)


@pytest.mark.parametrize("solver", solve.SOLVERS[Diffusion])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_discrete_diffusions_are_sampled(solver, learn_sigma):
    def output(x, t):
        bar = jnp.asarray(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), jnp.float32)[t.astype(int)]
        noise = jnp.sqrt(1 - bar) * x  # expected for data N(0, 1)
        return jnp.concatenate([noise, 0 * x], axis=-1) if learn_sigma else noise

    x = sampler(DIFFUSION, still(output), steps=250, solver=solver, cfg_scale=1.5)()
    assert x.shape == (8, *SHAPE)
    assert abs(x.mean()) < 4 / x.size**0.5
    assert abs(x.std() - 1) < 4 / (2 * x.size) ** 0.5 + 0.02


@pytest.mark.parametrize(
    ("predicts", "options", "message"),
    [
        (DIFFUSION, {}, r"solver = 'euler_maruyama' cannot solve what this network predicts \(Diffusion\).*ddpm, ddim"),
        (DIFFUSION, {"solver": "heun"}, r"solver = 'heun' cannot solve what this network predicts \(Diffusion\)"),
        (
            Flow(),
            {"solver": "ddim"},
            r"solver = 'ddim' cannot solve what this network predicts \(Flow\).*euler, heun, dopri5",
        ),
        (Flow(), {"solver": "mean_flow"}, r"solver = 'mean_flow' cannot solve what this network predicts \(Flow\)"),
        (DIFFUSION, {"solver": "mean_flow"}, r"'mean_flow' cannot solve what this network predicts \(Diffusion\)"),
        (AverageVelocity(), {"solver": "ddim"}, r"'ddim' cannot solve what this network predicts \(AverageVelocity\)"),
        (AverageVelocity(), {"solver": "mean_flow", "steps": 0}, r"steps = 0: must be at least 1"),
        (Flow(), {"solver": "dopri"}, r"solver = 'dopri' is unknown; did you mean 'dopri5'"),
        (Flow(), {"diffusion": "SBDM"}, r"diffusion = 'SBDM' is unknown"),
        (Flow(), {"last_step_kind": "Mean"}, r"last_step_kind = 'Mean' is unknown; did you mean 'mean'"),
        (Flow(), {"diffusion_norm": -1.0}, r"diffusion_norm = -1.0: must be at least 0"),
        (Flow(), {"solver": "dopri5", "rtol": 0.0}, r"rtol = 0.0: must be more than 0"),
        (Flow(prediction="x"), {}, r"prediction = 'x' is unknown"),
        (DIFFUSION, {"solver": "ddim", "eta": 2.0}, r"eta = 2.0: must be at least 0 and at most 1"),
        (DIFFUSION, {"solver": "ddpm", "steps": 1001}, r"steps = 1001: must be at least 1 and at most 1000"),
        (None, {}, r"Objective.predicts = None, known: Flow, .* set config.samples.num=0"),
        (
            "velocity",
            {},
            r"Objective.predicts = 'velocity', known: Flow, AverageVelocity, Diffusion",
        ),
    ],
)
def test_wrong_combinations_are_refused(predicts, options, message):
    with pytest.raises(ConfigError, match=message):
        sampler(predicts, **options)


def tiny(objective, **options):
    config = default.get_config()
    config.batch_size = 8
    config.data = configs.slot("data", "synthetic", shape=(8, 8, 3), num_classes=4)
    config.codec = configs.slot("codecs", "pixels")
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.objective = configs.slot("objectives", objective, **options)
    config.sampler.update({"steps": 3, "batch_size": 8})
    return config


@pytest.mark.slow
def test_a_run_of_dits_formulation_trains_and_samples():
    config = tiny("ddpm")
    dataset = build.open_data(config)
    with pytest.raises(ConfigError, match=r"cannot solve what this network predicts \(Diffusion\)"):
        build.build(config, dataset.space).sampler()
    config.sampler.solver = "ddpm"
    parts = build.build(config, dataset.space).components
    loader = pipeline.batches(dataset, config.batch_size, seed=0, num_threads=0)
    batch = jax.tree.map(jnp.asarray, next(loader))
    loader.close()
    key = jax.random.key(0)
    with pytest.raises(ConfigError, match=r"set config\.model\.out_channels"):
        jax.eval_shape(initializer(parts, batch), key)
    config.model.out_channels = 2 * dataset.space.shape[-1]
    experiment = build.build(config, dataset.space)
    parts, sample = experiment.components, experiment.sampler()
    frozen = parts.codec.init()
    state, metrics = jax.jit(lambda s: train_step(parts, s, frozen, batch, key))(initializer(parts, batch)(key))
    assert {"mse", "vb"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    assert sample(state["ema"], frozen, np.arange(5) % 4, 0).shape == (5, *dataset.space.shape)


@pytest.mark.slow
def test_a_run_of_meanflow_trains_and_samples():
    config = tiny("mean_flow")
    config.data = configs.slot("data", "digits")
    config.model.skip = "release"
    config.sampler.update({"solver": "mean_flow", "steps": 1})
    dataset = build.open_data(config)
    experiment = build.build(config, dataset.space)
    parts, sample = experiment.components, experiment.sampler()
    loader = pipeline.batches(dataset, config.batch_size, seed=0, num_threads=0)
    frozen, key = parts.codec.init(), jax.random.key(0)
    batch = jax.tree.map(jnp.asarray, next(loader))

    state, step = jax.jit(initializer(parts, batch))(key), jax.jit(partial(train_step, parts))
    before = state["params"]
    for _ in range(3):
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, next(loader)), key)
        assert {"raw", "v_loss"} <= metrics.keys()
        assert all(np.isfinite(value) for value in metrics.values())
    loader.close()
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), before, state["params"])
    assert changed["span_embed"]["fc2"]["kernel"]
    assert changed["deep"]["ada"]["kernel"]
    assert sample(state["ema"], frozen, np.arange(5), 0).shape == (5, *dataset.space.shape)


def test_the_model_is_built_for_the_objective():
    for objective, spans in (("mean_flow", True), ("flow_matching", False)):
        model = build.build(tiny(objective), Space((8, 8, 3), Conditions.labels(4))).components.model
        assert ("span_embed" in jax.eval_shape(model.init, jax.random.key(0))) == spans
    with pytest.raises(ConfigError, match=r"needs a network with the input 'spam'; model dit: did you mean 'span'"):
        models.make("dit", SPACE, {"spam": ()})


def test_the_objective_says_what_its_network_predicts():
    assert objectives.make("flow_matching", path="vp", prediction="score").predicts == Flow(PATHS["vp"], "score")
    assert objectives.make("reg", path="cosine", width=3).predicts == Flow(PATHS["cosine"], token=3)
    assert objectives.make("ddpm", num_timesteps=50).predicts.schedule.num_timesteps == 50
    assert isinstance(objectives.make("mean_flow").predicts, AverageVelocity)


@pytest.mark.parametrize("predicts", [Flow(PATHS["cosine"], "noise"), DIFFUSION])
def test_a_weak_state_of_the_model_guides_it(predicts):
    """Predictions are linear in guidance: one of 3, guided at scale 2 by one of 1, is one of 5."""
    model = Model(lambda key: {}, lambda params, x, t, y: (params * 0.1 * x, ()))
    solver = "ddim" if predicts is DIFFUSION else "heun"
    make = partial(sampling.make, model, PIXELS, SPACE, trained(predicts), sharding.make(), solver=solver, steps=5)
    labels, one, three, five = np.arange(8) % CLASSES, *map(jnp.float32, (1, 3, 5))
    plain, guided = make(), make(cfg_scale=2.0)
    np.testing.assert_allclose(guided(three, {}, labels, 0, weak=one), plain(five, {}, labels, 0), rtol=1e-4)
    np.testing.assert_array_equal(plain(three, {}, labels, 0, weak=one), plain(three, {}, labels, 0))


# --- Options.

BY_LABEL = Model(lambda key: {}, lambda params, x, t, y: (0 * x + y[:, None, None, None], ()))


def drawn(space=SPACE, codec=PIXELS, weak=None, labels=range(3), first=0, call=None, **options):
    """Samples of a velocity that is the label, in two steps: the noise less the guided label."""
    given = {"solver": "euler", "steps": 2, "batch_size": 8} | options
    sample = sampling.make(BY_LABEL, codec, space, trained(Flow()), sharding.make(), **given)
    return sample({}, {}, np.array(labels), 0, weak=weak, first=first, **(call or {}))


def test_guidance_of_a_call_is_that_of_a_sampler():
    """3 is the null label: 3 + 2 (y - 3), and y where the interval ends before the first of two steps."""
    labels = np.arange(3)[:, None, None, None]
    plain, guided = drawn(), drawn(cfg_scale=2.0)
    np.testing.assert_allclose(plain - guided, labels - 3 + 0 * plain, atol=1e-5)
    np.testing.assert_array_equal(drawn(call={"cfg_scale": 2.0}), guided)
    np.testing.assert_array_equal(drawn(cfg_scale=2.0, call={"cfg_scale": 1.0}), plain)
    half = drawn(cfg_scale=2.0, guidance_interval=(0.0, 0.9))
    np.testing.assert_allclose(plain - half, (labels - 3) / 2 + 0 * plain, atol=1e-5)
    np.testing.assert_array_equal(drawn(cfg_scale=2.0, call={"guidance_interval": (0.0, 0.9)}), half)
    np.testing.assert_array_equal(drawn(labels=[2], first=2), plain[2:])


def test_guidance_of_some_channels_leaves_the_others():
    plain, guided = drawn(), drawn(cfg_scale=2.0, guidance_channels=1)
    np.testing.assert_allclose((plain - guided)[..., 0], np.arange(3)[:, None, None] - 3 + 0 * plain[..., 0], atol=1e-5)
    np.testing.assert_array_equal(guided[..., 1], plain[..., 1])
    assert sampling.state_of(DIFFUSION, SHAPE, None, None).channels == SHAPE[-1], "guided variance"
    for channels in (0, 3):
        with pytest.raises(ConfigError, match=f"guidance_channels = {channels}: must be at least 1 and at most 2"):
            drawn(guidance_channels=channels)


@pytest.mark.parametrize(("given", "wanted"), [(None, 2.0), (1.5, 1.5), (0.5, 0.5), (0.0, 1.0), (-1.0, 1.0)])
def test_the_scale_of_the_token(given, wanted):
    scales = sampling.state_of(Flow(token=3), SHAPE, 1, given).scales(2.0)
    np.testing.assert_array_equal(scales[-3:], wanted)
    np.testing.assert_array_equal(scales[:-3].reshape(-1, 2), np.tile([2.0, 1.0], (64, 1)))


def test_guidance_that_cannot_be_is_refused_at_the_call():
    none = Space(SHAPE, Conditions.labels(0))
    with pytest.raises(ConfigError, match=r"cfg_scale = 2\.0: must be 1, because the data have no classes"):
        drawn(none, labels=[0], call={"cfg_scale": 2.0})
    assert drawn(none, labels=[0], weak={}, call={"cfg_scale": 2.0}).shape == (1, *SHAPE)
    with pytest.raises(ConfigError, match=r"guidance_interval = \(0\.9, 0\.2\): must be two times"):
        drawn(call={"guidance_interval": (0.9, 0.2)})


def test_the_codec_turns_conditions_and_samples():
    """The network sees 10 y, of the null label too."""
    codec = PIXELS._replace(condition=lambda frozen, y: 10 * y, decode=lambda frozen, x: x + 100)
    labels = np.arange(3)[:, None, None, None]
    plain = drawn(labels=[0, 0, 0])
    np.testing.assert_allclose(drawn(codec=codec), plain + 100 - 10 * labels, atol=1e-4)
    np.testing.assert_allclose(drawn(codec=codec, cfg_scale=2.0), plain + 100 - (20 * labels - 30), atol=1e-4)


def test_every_option_reaches_its_solver(monkeypatch):
    given, make = [], solve.make
    monkeypatch.setattr(solve, "make", lambda *arguments: (given.append(arguments), make(*arguments))[1])
    options = {"steps": 7, "diffusion": "linear", "diffusion_norm": 0.5, "last_step_kind": "euler", "last_step": 0.1}
    options |= {"rtol": 1e-2, "atol": 1e-5, "eta": 0.5}
    sampling.make(BY_LABEL, PIXELS, SPACE, trained(Flow()), sharding.make(), solver="heun", **options)
    assert given == [("heun", Flow(), solve.Options(**options))]


# --- Batches in flight.


def test_the_next_batch_is_dispatched_before_one_is_fetched(monkeypatch):
    """On eight devices that exchange what they compute: at most two batches are in flight, and no image changes."""
    model = models.make("dit", SPACE, depth=2, width=16, heads=2)
    layout = sharding.make(data=2, fsdp=2, tensor=2)
    sample = sampling.make(model, PIXELS, SPACE, trained(Flow()), layout, steps=3, batch_size=8)
    where = sharding.shardings(build.abstract_params(model, layout), layout)
    params, labels = jax.jit(model.init, out_shardings=where)(jax.random.key(0)), np.arange(29) % CLASSES
    alone = [sample(params, {}, labels[k : k + 8], 5, first=100 + k) for k in range(0, 29, 8)]

    done, put, device_get = [], sharding.put, jax.device_get

    def put_batch(tree, where):
        done.extend(["put"] * isinstance(tree, tuple))
        return put(tree, where)

    def get(images):
        done.append("get")
        return device_get(images)

    monkeypatch.setattr(sharding, "put", put_batch)
    monkeypatch.setattr(jax, "device_get", get)
    np.testing.assert_array_equal(sample(params, {}, labels, 5, first=100), np.concatenate(alone))
    assert done == ["put", "put", "get", "put", "get", "put", "get", "get"]


def test_the_first_batch_that_is_not_finite_is_named():
    """Though the next was dispatched, and those after it would be finite."""
    model = Model(lambda key: {}, lambda params, x, t, y: (jnp.where(y == 2, jnp.nan, 0)[:, None, None, None] * x, ()))
    sample = sampling.make(model, PIXELS, SPACE, trained(Flow()), sharding.make(), steps=2, batch_size=8)
    for labels, message in ([0, 1, 2, 0, 0], "116 to 123"), ([0, 1, 0, 1, 2], "132 to 139"), ([2], "100 to 107"):
        with pytest.raises(NonFiniteError, match=f"samples {message} are not finite"):
            sample({}, {}, np.repeat(labels, 8), 0, first=100)
    assert sample({}, {}, np.repeat([0, 1], 8), 0).shape == (16, *SHAPE)


def test_the_program_is_lowered_for_abstract_arrays():
    model = models.make("dit", SPACE, depth=2, width=16, heads=2)
    layout = sharding.make(data=2, devices=jax.devices()[:2])
    options = {"solver": "euler", "steps": 2, "batch_size": 5}
    sample = sampling.make(model, PIXELS, SPACE, trained(Flow()), layout, **options)
    params = build.abstract_params(model, layout)
    lowered = sample.lower(params, {})
    images, finite = lowered.out_info
    assert (images.shape, images.dtype) == ((6, *SHAPE), np.float32)  # 5, filled up for the devices of the layout
    assert finite.shape == ()
    assert re.search(r"%arg\d+: tensor<i1>", lowered.as_text()), "it does not wait for the batch before"


def test_dopri5_with_too_few_steps_asks_for_more():
    rough = still(lambda x, t: jnp.sin(300 * t) * jnp.ones_like(x))
    with pytest.raises(ConfigError, match=r"'dopri5' did not reach the end in steps = 3: give more steps"):
        sampler(Flow(), rough, solver="dopri5", steps=3)()
    with pytest.raises(NonFiniteError, match="samples 0 to 7 are not finite"):
        sampler(Flow(), still(lambda x, t: x + jnp.nan), solver="dopri5", steps=3)()


def test_a_network_that_never_saw_the_null_condition_is_not_guided():
    sample = sampling.make(still(lambda x, t: x), PIXELS, SPACE, trained(Flow(), False), sharding.make(), steps=2)
    labels = np.arange(8) % CLASSES
    for scale in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"cfg_scale = {scale}: must be 1, .*condition_drop = 0"):
            sample({}, {}, labels, 0, cfg_scale=scale)
    sample({}, {}, labels, 0, weak={}, cfg_scale=1.5)  # autoguidance needs no null condition


@pytest.mark.parametrize("name", ["flow_matching", "ddpm", "reg", "mean_flow"])
def test_objectives_say_whether_they_learn_the_null_condition(name):
    more = {"kappa": 0.0} if name == "mean_flow" else {}
    assert objectives.make(name, **more).learns_null
    assert not objectives.make(name, condition_drop=0.0, **more).learns_null


def test_mean_flow_guides_its_training_only_by_a_condition_that_it_learns():
    with pytest.raises(ConfigError, match=r"kappa = 0.5: guidance needs condition_drop above 0"):
        objectives.make("mean_flow", condition_drop=0.0)

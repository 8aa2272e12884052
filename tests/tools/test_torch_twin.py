"""The twin in PyTorch, which a benchmark times beside ours, does what ours does: step by step and draw by draw."""

from functools import partial, reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.api import Codec, Conditions, Objective, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import default
from diversedit_jax.diffusion import solvers
from diversedit_jax.diffusion.guidance import guide
from diversedit_jax.diffusion.paths import PATHS
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.objectives.flow_matching import regress
from diversedit_jax.runs import build
from diversedit_jax.runs.build import Experiment
from diversedit_jax.training.step import initializer, train_step
from diversedit_jax.weights import dit as releases
from tools.benchmark import torch_twin
from tools.benchmark.torch_twin import Twin, job_of

SHAPE, CLASSES, BATCH = (8, 4, 3), 5, 8
SPACE = Space(SHAPE, Conditions.labels(CLASSES))
KEY = jax.random.key(0)


def config_of(skip: str = "release", diversity: bool = True, **model):
    """A small network, and an optimizer whose options all matter in two steps."""
    config = default.get_config()
    config.batch_size = BATCH
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.codec = slot("codecs", "pixels")
    config.model.update({"depth": 5, "width": 32, "heads": 2, "mlp_ratio": 3.0, "skip": skip, "remat": "none", **model})
    # with a large eps the step is smooth in the gradient: without, rounding decides the sign of the smallest
    config.optim.update({"learning_rate": 0.01, "b1": 0.7, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "clip": 0.5})
    config.ema_decay = 0.8
    if diversity:
        config.losses.diversity = slot("losses", "diversity", groups=2, lo=0.0, hi=0.9, k=6, coefficient=2.0)
    return config


def draws():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, BATCH, *SHAPE), dtype=np.float32)
    t, y = rng.uniform(0.05, 0.95, BATCH).astype(np.float32), rng.integers(CLASSES + 1, size=BATCH, dtype=np.int32)
    return {"x": x, "noise": noise, "t": t, "y": y}


def random_like(shapes):
    """No parameter is zero, as those of adaLN and the last layer are at first: most gradients would be, too."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.standard_normal(p.shape, dtype=np.float32)), shapes)


def given(network, batch, context):
    """Flow matching with the draws in the batch."""
    return regress(network, PATHS["linear"], *(batch[name] for name in ("x", "noise", "t", "y")))


def unbuilt(config) -> Experiment:
    """What a job is made of, without its components."""
    return Experiment(config, SPACE, None, None, {})


def start(config):
    """A run without draws of its own, and its state."""
    experiment = build.build(config, SPACE, devices=jax.devices()[:1])
    codec = Codec(dict, lambda frozen, batch, key: batch, None)
    parts = experiment.components._replace(objective=Objective(given), codec=codec)
    shapes = jax.eval_shape(initializer(parts, jax.device_put(draws())), KEY)
    params = random_like(shapes["params"])
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return experiment._replace(components=parts), state | {"params": params, "ema": params}


def published(params, job) -> dict[str, np.ndarray]:
    arch = releases.architecture("sit", {name: array.shape for name, array in job["params"].items()}, heads=2)
    return releases.export(jax.device_get(params), "sit", arch)


def assert_close(found, wanted, name: str, tolerance: float):
    """Equal relative to the largest element."""
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("skip", "diversity", "model"),
    [("none", False, {"qk_norm": True, "depth": 2}), ("release", True, {})],
    ids=["plain", "diversedit"],
)
def test_two_training_steps_equal_ours(skip, diversity, model):
    pytest.importorskip("torch")
    config = config_of(skip, diversity, **model)
    experiment, state = start(config)
    job = job_of(experiment, state["params"], draws(), "train", threads=1, compile=False)
    new, step = state, jax.jit(partial(train_step, experiment.components))
    for _ in range(2):
        new, metrics = step(new, {}, jax.device_put(draws()), KEY)
    assert not diversity or 0 < metrics["diversity/weight"] < 2, "the loss's ramp is not tested"
    with Twin(job) as twin:
        found = twin.once(draws(), steps=2)
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
        for kind in ("params", "ema"):
            before, after = published(state[kind], job), published(new[kind], job)
            for name in before:
                moved, wanted = found[f"{kind}/{name}"] - before[name], after[name] - before[name]
                assert_close(moved, wanted, f"how {kind}/{name} moves", 1e-3)
                assert_close(found[f"{kind}/{name}"], after[name], f"{kind}/{name}", 1e-5)
        assert set(found) == metrics.keys() | {f"{kind}/{name}" for kind in ("params", "ema") for name in before}
        assert twin.run(2) > 0
        assert twin.peak_bytes() is None
        assert twin.facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
        kinds = {type(fact) for fact in twin.facts.values()}
        assert kinds <= {str, bool, int, float}, "to receive another type may be to import torch"
        assert (twin.facts["compile"], twin.facts["why_not"], twin.facts["threads"]) == (False, "not asked for", 1)


def test_samples_equal_ours():
    pytest.importorskip("torch")
    config = config_of(diversity=False)
    config.sampler.update({"steps": 6, "cfg_scale": 2.5, "guidance_interval": (0.1, 0.7)})
    experiment, state = start(config)
    network = experiment.components.model.network(state["ema"])
    rng = np.random.default_rng(2)
    x, noise = rng.standard_normal((BATCH, *SHAPE), np.float32), rng.standard_normal((6, BATCH, *SHAPE), np.float32)
    y = np.arange(BATCH, dtype=np.int32) % CLASSES

    @jax.jit
    def sample(scale):
        velocity = guide(network, jnp.asarray(y), np.int32(CLASSES), scale=scale, interval=(0.1, 0.7))
        times = solvers.sde_times(6, PATHS["linear"], "velocity", "sigma", "mean", 0.04)
        return solvers.euler_maruyama(velocity, jnp.asarray(x), times, lambda i: jnp.asarray(noise)[i])

    guided, plain = (np.asarray(sample(scale)) for scale in (2.5, 1.0))
    assert np.abs(guided - plain).max() > 0.01 * np.abs(guided).max(), "guidance does nothing here"
    job = job_of(experiment, state["ema"], {"y": y}, "sample", threads=1, compile=False)
    with Twin(job) as twin:
        assert_close(twin.once({"x": x, "noise": noise, "y": y})["x"], guided, "samples", 1e-4)
        assert twin.run(1) > 0


def test_what_a_step_draws():
    pytest.importorskip("torch")
    from tools.benchmark import torch_sit

    config = config_of(diversity=False)
    config.codec = slot("codecs", "vae", scale=0.5, bias=1.0)
    config.objective.condition_drop = 0.25
    n = 1000
    moments = np.concatenate([np.full((n, *SHAPE), 5), np.full((n, *SHAPE), 3)], axis=-1).astype(np.float16)
    batch = {"moments": moments, "y": np.zeros(n, np.int32)}
    params = start(config_of(diversity=False))[1]["params"]
    job = job_of(unbuilt(config), params, batch, "train")
    drawn = torch_sit.drawn(job, {name: torch_sit.on_device(job, array) for name, array in batch.items()})
    x, noise, t, y = (array.numpy() for array in drawn)
    assert x.shape == noise.shape == (n, 3, 8, 4)
    assert {array.dtype for array in (x, noise, t)} == {np.dtype("float32")}
    np.testing.assert_allclose([x.mean(), x.std(), noise.std(), t.mean()], [2, 1.5, 1, 0.5], rtol=0.05)
    assert abs(noise.mean()) < 0.05
    assert 0 <= t.min() < 0.01 < 0.99 < t.max() <= 1
    np.testing.assert_allclose((y == CLASSES).mean(), 0.25, atol=0.06)
    assert set(y.tolist()) == {0, CLASSES}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "sample"])
def test_it_compiles(kind):
    """In bfloat16, and the compiled step does what the plain one does, up to its rounding."""
    pytest.importorskip("torch")
    config = config_of(dtype="bfloat16")
    config.sampler.update({"steps": 3, "cfg_scale": 2.0, "guidance_interval": (0.0, 0.7)})
    experiment, state = start(config)
    inputs = draws() | ({"noise": np.zeros((3, BATCH, *SHAPE), np.float32)} if kind == "sample" else {})
    found = []
    for compile in (True, False):
        with Twin(job_of(experiment, state["params"], draws(), kind, compile=compile)) as twin:
            assert twin.facts["compile"] == compile, twin.facts["why_not"]
            found.append(twin.once(inputs))
            assert twin.run(1) > 0
    for name, wanted in found[1].items():
        assert_close(found[0][name], wanted, name, 0.02)


# --- What goes wrong.


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model.skip": "uvit"}, "train", r"config\.model\.skip = 'uvit' is not among them"),
        ({"model.dtype": "float16"}, "train", r"config\.model\.dtype = 'float16'"),
        ({"model.out_channels": 6}, "train", r"config\.model\.out_channels = 6"),
        ({"objective.path": "cosine"}, "train", r"config\.objective\.path = 'cosine'"),
        ({"objective": slot("objectives", "ddpm")}, "train", r"config\.objective\.name = 'ddpm'"),
        ({"encoders": {"dinov2": {"name": "dinov2"}}}, "train", r"config\.encoders = \{'dinov2'"),
        ({"losses.sra": slot("losses", "sra")}, "train", r"config\.losses\.sra = 'sra'"),
        ({"losses.diversity.preset": "paper"}, "train", r"config\.losses\.diversity\.redraw = True"),
        ({"losses.diversity.warmup_steps": 9}, "train", r"config\.losses\.diversity\.warmup_steps = 9"),
        ({"losses.again": slot("losses", "diversity")}, "train", r"config\.losses = \['again', 'diversity'\]"),
        ({"accumulate": 2}, "train", r"config\.accumulate = 2"),
        ({"optim.decay": "cosine"}, "train", r"config\.optim\.decay = 'cosine'"),
        ({"sampler.solver": "heun"}, "sample", r"config\.sampler\.solver = 'heun'"),
        ({}, "both", r"kind = 'both' is unknown; known: train, sample"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_twin_cannot_do_is_named(change, kind, message):
    config = config_of()
    with config.unlocked():
        for place, value in change.items():
            *slots, name = place.split(".")
            reduce(getitem, slots, config)[name] = value
    with pytest.raises(ConfigError, match=message):
        job_of(unbuilt(config), {}, draws(), kind)


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch_twin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--vs=torch needs PyTorch: pip install torch"):
        Twin({})


def test_an_error_in_the_process_arrives_with_its_traceback():
    pytest.importorskip("torch")
    experiment, state = start(config_of(diversity=False))
    job = job_of(experiment, state["params"], draws(), "train", compile=False)
    with Twin(job) as twin:
        with pytest.raises(RunError, match=r"(?s)PyTorch: KeyError: 'noise'.*torch_sit\.py"):
            twin.once({"x": draws()["x"]})
        assert twin.run(1) > 0, "an error ends the process"
        twin._process.kill()
        with pytest.raises(RunError, match="the process with PyTorch has ended with code -9"):
            twin.run(1)
    del job["params"]["blocks.3.mlp.fc1.bias"]
    with pytest.raises(RunError, match=r"(?s)Missing key.*blocks\.3\.mlp\.fc1\.bias"):
        Twin(job)


def test_a_torch_that_cannot_be_imported_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch_twin.importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(RunError, match=r"(?s)has ended with code 1\. It wrote: .*ImportError: no such library"):
        Twin({})

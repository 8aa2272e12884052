"""Training starts from a trained network: a public release, with long residual connections added, or another run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import models, train
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build, starting
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests import untrained
from tools import convert_checkpoint

SPACE = Space((8, 8, 1), Conditions.labels(10))
DIMS = {"depth": 4, "width": 16, "heads": 2}


def tiny(file, **model):
    config = digits.get_config()
    config.update({"total_steps": 1, "batch_size": 16})
    config.model.update(DIMS | {"skip": "none"} | model)
    config.samples.num = 10
    config.sampler.update({"solver": "euler", "steps": 1, "batch_size": 16})
    config.evaluators = ConfigDict()
    config.init_from.update({"file": file and str(file), "heads": 2})
    return config


@pytest.fixture
def release(tmp_path):
    """A SiT for digits under the names of REPA, all of its weights random."""
    model = models.make("dit", SPACE, **DIMS)
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = tree.unflatten([0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])
    arch = releases.Architecture(**DIMS, patch=2, channels=1, out_channels=1, num_classes=10)
    write_safetensors(tmp_path / "sit.safetensors", releases.export(params, "sit", arch, sides=(8, 8)))
    return tmp_path / "sit.safetensors", params


def outputs(params, **options):
    model = models.make("dit", SPACE, **DIMS, **options)
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    return model.apply(params, x, jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 4, 10]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["release", "uvit"])
def test_skips_added_to_a_release_leave_its_outputs_unchanged(release, tmp_path, skip, capfd):
    file, params = release
    config = tiny(file, skip=skip, skip_init="identity")
    config.optim.learning_rate = 1e-30  # the state after one step is the state at the start
    state = train.run(config, tmp_path / "run")
    assert f"starting from {file}; new: merges" in capfd.readouterr().err
    found = outputs(state["ema"], skip=skip, skip_init="identity")
    np.testing.assert_allclose(found, outputs(params), atol=1e-5)


def test_a_release_with_other_dimensions_is_refused_by_array(release, tmp_path):
    file, _ = release
    with pytest.raises(
        ConfigError, match=r"does not fit config.model: deep.ada.bias is \[2, 96\] there, \[3, 96\] here"
    ):
        train.run(tiny(file, depth=5), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def begun(config, space=SPACE):
    """What a run of this config starts with."""
    experiment = build.build(config, space)
    return starting.start(experiment, jax.eval_shape(experiment.components.model.init, jax.random.key(0)))


SEVEN = Space((8, 8, 1), Conditions.labels(7))


def test_the_table_of_labels_starts_anew_for_other_classes(release):
    file, params = release
    found = begun(tiny(file), SEVEN)
    table = found.params["label_embed"]["embedding"]
    assert (table.at, table.shape) == ((7,), (8, 16))
    np.testing.assert_array_equal(table.values[0], params["label_embed"]["embedding"][10])
    assert found.told == (
        f"starting from {file}",
        "from sit.safetensors: it knows 10 classes, the data have 7: "
        "the table of labels is new, but for the null label",
    )


def test_parts_start_anew_if_asked_for(release):
    file, params = release
    config = tiny(file)
    config.init_from.fresh = ("label_embed",)
    found = begun(config, SEVEN)
    assert found.params.keys() == params.keys() - {"label_embed"}
    assert found.told == (f"starting from {file}; new: label_embed",)
    np.testing.assert_array_equal(found.params["final"]["kernel"], params["final"]["kernel"])
    config.init_from.fresh = ("label_embd",)
    with pytest.raises(ConfigError, match=r"init_from.fresh = 'label_embd' is unknown; did you mean 'label_embed'"):
        begun(config, SEVEN)


def test_a_release_that_predicts_something_else_is_told(release):
    config = tiny(release[0])
    config.objective.prediction = "noise"
    said = "it was trained by flow_matching, this run by it, too, but with other options: what it predicts means"
    assert said in begun(config).told[-1]
    config.objective = slot("objectives", "ddpm", learn_sigma=False)
    config.sampler.solver = "ddpm"
    assert "it was trained by flow_matching, this run by ddpm: what it predicts means" in begun(config).told[-1]


@pytest.fixture
def run(tmp_path):
    """A run with random weights, the EMA and the trained ones, at two steps."""
    workdir = tmp_path / "source"
    workdir.mkdir()
    config = tiny(None, skip="gate")
    config.init_from.heads = None
    untrained.leave(workdir, config, {1: ["ema", "params"], 2: ["ema", "params"]}, 0.2)
    return workdir


def from_run(workdir, **given):
    config = tiny(workdir, skip="gate")
    config.init_from.update({"heads": None} | given)
    return config


def test_a_run_and_a_published_folder_are_sources(run, tmp_path):
    """The last checkpoint: its EMA, or the trained weights."""
    parts = build.build(from_run(run), SPACE).components
    shapes = jax.eval_shape(parts.model.init, jax.random.key(0))
    for weights, seed in ((None, 2), ("ema", 2), ("online", 3)):
        found = begun(from_run(run, weights=weights))
        jax.tree.map(np.testing.assert_array_equal, found.params, untrained.randomly(shapes, seed, 0.2))
        assert found.told == (f"starting from {run}",)
    convert_checkpoint.publish(run, tmp_path / "published")
    found = begun(from_run(tmp_path / "published"))
    jax.tree.map(np.testing.assert_array_equal, found.params, untrained.randomly(shapes, 2, 0.2))
    with pytest.raises(ConfigError, match=r"holds the weights 'ema' alone, not 'params'"):
        begun(from_run(tmp_path / "published", weights="online"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"weights": "model"}, r"config.init_from.weights = 'model' is unknown; known: ema, online"),
        ({"family": "sit"}, r"config.init_from.family = 'sit' is for a file of a release, and .*source is a run"),
        ({"heads": 2}, r"config.init_from.heads = 2 is for a file of a release"),
        ({"file": None, "family": "sit"}, r"config.init_from.file is not set, and config.init_from.family = 'sit' is"),
    ],
)
def test_what_a_run_as_a_source_does_not_take(run, given, told):
    with pytest.raises(ConfigError, match=told):
        begun(from_run(run, **given))


def test_code_outside_the_package_that_a_run_names_needs_trust(run, release):
    stored = json.loads((run / "config.json").read_text())
    stored["objective"]["name"] = "somebody:make"
    (run / "config.json").write_text(json.dumps(stored))
    told = r"runs code outside this package: somebody:make .*allow it by --config.init_from.trust=True"
    with pytest.raises(ConfigError, match=told):
        begun(from_run(run))
    with pytest.raises(ConfigError, match=r"config.objective.name: cannot load 'somebody:make'"):
        begun(from_run(run, trust=True))
    config = tiny(release[0])
    config.init_from.trust = True
    with pytest.raises(ConfigError, match=r"config.init_from.trust = True is for the folder of a run"):
        begun(config)

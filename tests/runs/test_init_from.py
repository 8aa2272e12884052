"""Training starts from a public release, with long residual connections added to one that has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import models, train
from diversedit_jax.api import Conditions, Space
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors

SPACE = Space((8, 8, 1), Conditions.labels(10))
DIMS = {"depth": 4, "width": 16, "heads": 2}


def tiny(file, **model):
    config = digits.get_config()
    config.update({"total_steps": 1, "batch_size": 16})
    config.model.update(DIMS | {"skip": "none"} | model)
    config.samples.num = 10
    config.sampler.update({"solver": "euler", "steps": 1, "batch_size": 16})
    config.evaluators = ConfigDict()
    config.init_from.update({"file": str(file), "heads": 2})
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


def other_classes(file, fresh):
    """A release for 10 classes, and a config for 7: what `starting_params` makes of them."""
    config, space = tiny(file), Space((8, 8, 1), Conditions.labels(7))
    config.init_from.fresh = fresh
    model = models.make("dit", space, **DIMS)
    return XX


def test_parts_for_other_classes_start_anew_if_asked_for(release):
    file, params = release
    told = r"label_embed/embedding is \[11, 16\] there, \[8, 16\] here; .*init_from.fresh=\"\('label_embed',\)\""
    with pytest.raises(ConfigError, match=told):
        other_classes(file, ())
    found = other_classes(file, ("label_embed",))
    assert found.keys() == params.keys() - {"label_embed"}
    np.testing.assert_array_equal(found["final"]["kernel"], params["final"]["kernel"])
    with pytest.raises(ConfigError, match=r"init_from.fresh = 'label_embd' is unknown; did you mean 'label_embed'"):
        other_classes(file, ("label_embd",))

"""Every config builds, and one training step of it traces at full size; the config files say what they must."""

import contextlib
import importlib
import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import default
from diversedit_jax import config as configs
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build as experiment
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer as optim
from diversedit_jax.training.step import initializer, train_step
from tests import ROOT
from tests.data.test_latents import write
from tests.reference import DATA

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
# By default one size of a recipe, at one resolution, and of each kind the largest: tracing takes seconds. What a recipe
# holds alone, that with DiverseDiT holds too.
LARGE = [("diversedit_xl2", "512"), ("dit_xl2", None)]
ALONE = ("default", "repa_b2", "repa_multi_b2", "sra_b2", "disp_b2", "disp_diversedit_b2", "mean_flow_b2")
VARIANTS = [
    pytest.param(
        name,
        variant,
        marks=[pytest.mark.slow]
        * (((variant is not None or size in ("l2", "xl2")) and (name, variant) not in LARGE) or name in ALONE),
    )
    for name, size in ((name, name.split("_")[-1]) for name in NAMES)
    for variant in (None, "512")
    if variant is None or name not in ("default", "digits", "photos", "repa_multi_b2")
]
VARIANTS += [("repa_multi_b2", "dinov2@5,mae@10")]
MILLIONS = {"sit_b2": 130.30, "sit_l2": 457.82, "sit_xl2": 674.82}
MILLIONS["dit_xl2"] = 674.83  # its authors count the position table too: 675.13
MILLIONS |= {"diversedit_b2": 137.40, "diversedit_l2": 483.05, "diversedit_xl2": 712.06}
MILLIONS |= {"mean_flow_xl2": 676.44, "mean_flow_diversedit_xl2": 713.68}
MILLIONS |= {"reg_b2": 131.49, "reg_xl2": 676.59, "reg_diversedit_xl2": 713.83}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Small data sets in the layout of ImageNet latents, by the side of a latent."""

    def image(side: int):
        shape = (8 * side, 8 * side, 3)
        feature = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
        return {"image": (feature, lambda index: np.zeros(shape, np.uint8))}

    return {
        side: write(tmp_path_factory.mktemp(f"l{side}"), 4, (2, side, side, 8), more=image(side)) for side in (32, 64)
    }


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_one_step_traces_at_full_size(name, variant, latents):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config(variant) if variant else module.get_config()
    if config.data.name == "latents":
        config.data.data_dir = latents[64 if variant == "512" else 32]
    for encoder in config.encoders.values():  # a small DINOv2 stands for any, which has the file's names
        encoder.update({"name": "dinov2", "file": str(DATA / "dinov2.safetensors"), "heads": 4})
    if "vae" in config.codec:
        config.codec.vae = None  # decoding has tests of its own
    shape = config.data.get("shape", (8, 8, 1)) or (32, 32, 4)  # None: as the data have it
    model = configs.make("models", config.model, "config.model", shape, 1000)
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    if name in MILLIONS:
        assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.01)
    if config.model.token_width is not None:
        config.model.token_width = 48  # of that small one
    dataset = experiment.open_data(config)
    assert dataset.shape[0] == (64 if variant == "512" else 8 if name == "digits" else 32)
    _, parts, _, _ = experiment.build(config, dataset.shape, dataset.num_classes)
    loader = pipeline.batches(dataset, config.batch_size, seed=config.seed, num_threads=0)
    batch = jax.tree.map(jnp.asarray, next(loader))
    loader.close()
    key = jax.random.key(0)
    state = jax.eval_shape(initializer(parts, batch), key)
    after, metrics = jax.eval_shape(partial(train_step, parts), state, parts.codec.init(), batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [leaf.shape for leaf in jax.tree.leaves(state)]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state["params"], state["ema"])))
    assert {"loss/total", "loss/objective", "grad_norm"} <= metrics.keys()
    assert ("loss/diversity" in metrics) == ("diversedit" in name or name in ("digits", "photos"))
    kinds = set(name.split("_")) | ({"repa"} if name.startswith("reg_") else set())
    for part, loss in {"repa": "repa", "sra": "sra", "disp": "dispersive"}.items():
        assert any(key.startswith(f"loss/{loss}") for key in metrics) == (part in kinds)


def test_the_training_step_lowers_for_tpus():
    """Without one, and without libtpu: the rules that turn each operation into what a TPU runs. It is not compiled."""
    config = importlib.import_module("configs.digits").get_config()
    dataset = experiment.open_data(config)
    _, parts, _, _ = experiment.build(config, dataset.shape, dataset.num_classes)
    with contextlib.closing(pipeline.batches(dataset, config.batch_size, seed=0, num_threads=0)) as batches:
        batch = jax.tree.map(jnp.asarray, next(batches))
    key = jax.random.key(0)
    state = jax.eval_shape(initializer(parts, batch), key)
    traced = jax.jit(partial(train_step, parts)).trace(state, jax.eval_shape(parts.codec.init), batch, key)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("stablehlo.dot_general") > 50


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_its_command_hardware_and_expected_numbers(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    if name != "default":
        assert f"python -m diversedit_jax.train --config=configs/{name}.py" in text
        assert "Hardware" in text
        assert "Expected" in text


def test_default_holds_every_option_at_the_signatures_default():
    config = default.get_config()
    for held, build in [(config.optim, optim.make), (config.sampler, sampler.make)]:
        given = {name: parameter.default for name, parameter in inspect.signature(build).parameters.items()}
        for name, value in held.to_dict().items():
            assert value == given[name], name


def test_slots_hold_all_options_and_know_the_types_of_those_not_set():
    config = configs.slot("losses", "diversity", k=5)
    assert config.name == "diversity"
    assert config.k == 5
    assert config.lo is None
    config.lo = 0.2
    with pytest.raises(TypeError):
        config.rule = 7
    with pytest.raises(ConfigError, match="no option 'kk'; did you mean 'k'"):
        configs.slot("losses", "diversity", kk=5)


def test_a_config_survives_its_file(tmp_path):
    config = default.get_config()
    config.sampler.guidance_interval = (0.0, 0.7)
    assert configs.claim(tmp_path, config) == []
    assert configs.claim(tmp_path, config) == [], "tuples and lists are the same in JSON"
    assert configs.flat(configs.load(tmp_path).to_dict()) == configs.flat(config.to_dict())
    config.log_every = 7
    assert configs.claim(tmp_path, config) == ["config.log_every: 100 -> 7"]
    config.objective.path = "cosine"
    with pytest.raises(ConfigError, match=r"objective.path: 'linear' there, 'cosine' given"):
        configs.claim(tmp_path, config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 1, "seed: 0 there, 1 given"),
        ("batch_size", 512, "batch_size: 256 there, 512 given"),
        ("data.data_dir", "other", "data.data_dir: None there, 'other' given"),
        ("data.num_classes", 10, "data.num_classes: None there, 10 given"),
        ("optim.learning_rate", 1e-3, "optim.learning_rate: 0.0001 there, 0.001 given"),
        ("total_steps", 7, None),
        ("log_every", 7, None),
        ("watchdog", 7.0, None),
        ("mesh.fsdp", 4, None),
        ("input.num_workers", 2, None),
        ("checkpoint.every", 7, None),
        ("samples.every", 7, None),
    ],
)
def test_a_run_goes_on_with_the_same_training_and_other_reports(key, value, message, tmp_path):
    config = default.get_config()
    configs.claim(tmp_path, config)
    old = configs.flat(config.to_dict())[key]
    config.update_from_flattened_dict({key: value})
    if message is None:
        assert configs.claim(tmp_path, config) == [f"config.{key}: {old!r} -> {value!r}"]
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            configs.claim(tmp_path, config)


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0')
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        configs.load(tmp_path)


def test_several_alignments_share_the_coefficient():
    module = importlib.import_module("configs.repa_multi_b2")
    config = module.get_config("dinov2@5,mae@10")
    assert set(config.encoders) == {"dinov2", "mae"}
    assert {(c.encoder, c.block, c.coefficient) for c in config.losses.values()} == {
        ("dinov2", 5, 0.25),
        ("mae", 10, 0.25),
    }
    with pytest.raises(ValueError, match=r"wanted encoder@block.*, given 'dinov2_5'"):
        module.get_config("dinov2_5")


@pytest.mark.parametrize("size", ["b2", "l2", "xl2"])
def test_with_repa_the_diversity_loss_knows_the_aligned_block(size):
    config = importlib.import_module(f"configs.repa_diversedit_{size}").get_config()
    assert config.losses.diversity.aligned == config.losses.repa.block == (5 if size == "b2" else 8)

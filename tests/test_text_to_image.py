"""A network of captions, from training to pictures of prompts: resume, devices, guidance, stored features, errors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diversedit_jax
from diversedit_jax import sample, train
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build, trained
from diversedit_jax.training.checkpoint import Checkpoints
from tests import captioned
from tests.test_train import assert_one_device_is_as_eight, assert_resumed_to_the_bit
from tools import convert_checkpoint

PROMPTS = ["a small red seven", "a blue bus", ""]


def tiny(**changes):
    """The run of `captioned`, with two blocks, which compile fast; `changes` by dotted key."""
    return captioned.config(**{"model__depth": 2} | changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed: its directory and final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train.run(tiny(), workdir)


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_to_the_bit(straight, tmp_path):
    assert_resumed_to_the_bit(tiny, straight, tmp_path)


@pytest.mark.slow
def test_one_device_trains_as_eight_do(straight, tmp_path):
    assert_one_device_is_as_eight("tests.test_text_to_image.tiny()", straight, tmp_path)


def test_it_says_what_it_read(straight):
    workdir, _ = straight
    stored = Checkpoints(workdir / "checkpoints").meta()
    assert stored["null"][:2] == ["int32", [captioned.LENGTH]]
    found = build.inputs(tiny(), captioned.make_data("train"))
    assert {"text_encoder.file", "text_encoder.file (tokenizer)"} <= found.keys()


def test_pictures_of_prompts(straight, tmp_path, capfd):
    workdir, _ = straight
    source = trained.drawing(trained.of_run(workdir, trust=True), overrides={"cfg_scale": 2.0})
    out = sample.run(source, prompts=PROMPTS, num=5, out=tmp_path)
    with np.load(out / "samples.npz") as file:
        assert file["arr_0"].shape == (5, *captioned.SHAPE)
        assert file["prompts"].tolist() == [*PROMPTS, *PROMPTS[:2]]
        np.testing.assert_array_equal(file["condition"][2], captioned.ids())
        assert "labels" not in file
    with Image.open(out / "grid.png") as grid:
        assert grid.height > 2 * 96, "tiles are large enough for their prompts"
    assert "5 samples of" in capfd.readouterr().out
    assert sample.run(source, prompts=PROMPTS, out=tmp_path / "each") == tmp_path / "each"
    with np.load(tmp_path / "each" / "samples.npz") as file:
        assert len(file["arr_0"]) == len(PROMPTS), "by default one for each prompt"


class Sensitive:
    """A run whose network depends on its texts: all parameters are random, the gates too."""

    def __init__(self, workdir):
        self.found = trained.of_run(workdir, trust=True)
        params = self.found.load(self.found.last, "ema")
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        self.params = tree.unflatten(drawn)

    def draw(self, prompts, batch_size=16, cfg_scale=2.0, negative=None, num=None):
        source = trained.drawing(self.found, overrides={"batch_size": batch_size, "cfg_scale": cfg_scale})
        y = sample.conditions(source, num or len(prompts), 0, prompts=prompts)
        negative = None if negative is None else sample.one(source.prompts([negative]))
        return source.sampler(self.params, source.frozen, y, 0, negative=negative).astype(int)


@pytest.fixture(scope="module")
def sensitive(straight):
    return Sensitive(straight[0])


def test_a_prompt_and_a_seed_give_one_picture_at_any_batch_size(sensitive):
    prompts = [f"a red bus {i}" for i in range(20)]
    images = sensitive.draw(prompts)
    assert np.abs(images - sensitive.draw(prompts, batch_size=8)).max() <= 1
    other = sensitive.draw(["a blue cat", *prompts[1:]])
    assert np.abs(images[1:] - other[1:]).max() <= 1
    assert np.abs(images[0] - other[0]).max() > 10


def test_a_negative_prompt_is_guided_away_from(sensitive):
    prompts = ["a red bus", "two dogs"]
    empty = sensitive.draw(prompts)
    np.testing.assert_array_equal(sensitive.draw(prompts, negative=""), empty)
    assert np.abs(sensitive.draw(prompts, negative="a blue cat") - empty).max() > 10
    same = sensitive.draw(prompts[:1], negative=prompts[0])
    np.testing.assert_allclose(same, sensitive.draw(prompts[:1], cfg_scale=1.0), atol=1)
    with pytest.raises(ConfigError, match="a negative condition has no effect while cfg_scale is 1"):
        sensitive.draw(prompts, cfg_scale=1.0, negative="a blue cat")


def test_from_python(straight):
    model = diversedit_jax.load(straight[0], trust_workdir=True)
    images = model.sample(prompts=PROMPTS, cfg_scale=2.0, negative_prompt="a cat")
    assert images.shape == (3, *captioned.SHAPE)
    assert images.names == PROMPTS
    assert images._repr_png_()
    assert model.sample(prompts="a bus", num=2).names == ["a bus", "a bus"]
    assert len(model.sample(num=4).names) == 4, "held-out captions are read back"
    blocks = model.features(np.zeros((2, *captioned.SHAPE), np.uint8), t=0.5)
    assert blocks.shape == (2, 2, 16, 32)
    with pytest.raises(ConfigError, match="give labels or prompts, not both"):
        model.sample(labels=[1], prompts=["a"])
    with pytest.raises(ConfigError, match="labels: the conditions of these data are not labels: give prompts"):
        model.sample(labels=[1])


def test_long_prompts_are_cut_and_prompts_from_a_file(straight, tmp_path, capfd):
    source = trained.drawing(trained.of_run(straight[0], trust=True))
    long = source.prompts(["word " * 300, "🎉 naïve \t text"])
    assert long.shape == (2, captioned.LENGTH)
    assert long[0, -1] == captioned.END
    assert "only the first 14 tokens of a prompt are read: word word" in capfd.readouterr().err
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red bus\n\n  two, three\n", encoding="utf-8")
    assert sample.lines(file) == ["a red bus", "two, three"]
    for content, said in ((b"\n \n", "it has no prompt, wanted one on each line"), (b"\xff\xfe", "codec can't decode")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"--prompts_file=.*{re.escape(said)}"):
            sample.lines(file)
    with pytest.raises(ConfigError, match=r"--prompts_file=.*: \[Errno 2\] No such file"):
        sample.lines(tmp_path / "none.txt")


def make_stored(split: str, *, seed: int = 0) -> Dataset:
    """The images of `captioned` with features of their texts instead of token ids."""
    config = tiny()
    encoder, data = build.text_encoder(config), captioned.make_data(split, captions=1)
    texts = [captioned.ids(), *(example["y"] for example in data.source)]
    features = np.asarray(encoder.apply(encoder.init(), jnp.stack(texts))["context"]) + (seed and 3.0)
    source = [{"x": one["x"], "y": {"context": own}} for one, own in zip(data.source, features[1:], strict=True)]
    return Dataset(source, None, Space(captioned.SHAPE, Conditions({"context": features[0]})))


def with_stored_features(**options):
    """A config and its experiment, with data of `make_stored`."""
    config = tiny(data__captions=1)
    config.data = slot("data", "tests.test_text_to_image:make_stored", **options)
    return config, build.build(config, build.open_data(config).space)


@pytest.mark.slow
def test_stored_features_train_like_their_texts(tmp_path):
    wanted = train.run(tiny(data__captions=1), tmp_path / "texts")
    found = train.run(with_stored_features()[0], tmp_path / "features")
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found["params"], wanted["params"])
    assert max(jax.tree.leaves(apart)) < 1e-5


def test_prompts_become_features_where_the_data_store_them(straight):
    texts = trained.of_run(straight[0], trust=True).experiment
    given, wanted = with_stored_features()[1].prompts(["a red bus"]), texts.prompts(["a red bus"])
    assert given.keys() == {"context"}
    frozen = texts.components.codec.init()
    np.testing.assert_allclose(given["context"], texts.components.codec.condition(frozen, wanted)["context"], atol=1e-5)
    with pytest.raises(ConfigError, match=r"features of the empty text differ .* another text encoder"):
        with_stored_features(seed=1)[1].prompts(["a red bus"])


def test_a_release_draws_prompts(straight, tmp_path):
    workdir, _ = straight
    release, _ = convert_checkpoint.of_run(workdir, trust=True)
    assert release.family == "mmdit"
    assert release.arch.text == 16
    arrays = diversedit_jax.weights.dit.export(release.params, "mmdit", release.arch)
    captioned.save_file(arrays, tmp_path / "mmdit.safetensors")
    with pytest.raises(ConfigError, match=r"takes texts: give the text encoder.*--text_encoder=FILE"):
        trained.of_release(tmp_path / "mmdit.safetensors", heads=2, sides=8)
    found = trained.of_release(tmp_path / "mmdit.safetensors", heads=2, sides=8, text_encoder=str(captioned.encoder()))
    assert found.space.shape == (8, 8, 3)
    source = trained.drawing(found, overrides={"steps": 2, "batch_size": 8})
    assert source.sampler(source.params, source.frozen, source.prompts(PROMPTS), 0).shape == (3, 8, 8, 3)


def test_a_published_run_draws_prompts(straight, tmp_path):
    convert_checkpoint.publish(straight[0], tmp_path / "mine", trust=True)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert '--checkpoint=hf:OWNER/NAME --prompts="a red bus"' in card
    found = trained.of_run(tmp_path / "mine", trust=True)
    source, wanted = (trained.drawing(one) for one in (found, trained.of_run(straight[0], trust=True)))
    images = source.sampler(source.params, source.frozen, source.prompts(PROMPTS), 0)
    np.testing.assert_array_equal(images, wanted.sampler(wanted.params, wanted.frozen, wanted.prompts(PROMPTS), 0))


def test_stable_diffusion_3_of_diffusers_is_refused(tmp_path):
    arrays = {f"transformer_blocks.0.{name}": np.zeros((2, 2), np.float32) for name in ("attn.to_q.weight",)}
    captioned.save_file(
        arrays | {"context_embedder.weight": np.zeros((2, 2), np.float32)}, tmp_path / "sd3.safetensors"
    )
    with pytest.raises(ConfigError, match="Stable Diffusion 3 in the layout of diffusers, which is not read"):
        trained.of_release(tmp_path / "sd3.safetensors")


def test_what_does_not_fit_is_one_line(straight, tmp_path):
    with pytest.raises(ConfigError, match=r"model mmdit takes features of text, .* are others"):
        train.run(tiny(text_encoder=None), tmp_path / "a")
    misplaced = tiny()
    misplaced.encoders.text = misplaced.text_encoder
    with pytest.raises(ConfigError, match=r"config.encoders.text: clip_text encodes texts: use config.text_encoder"):
        train.run(misplaced, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"config.model: model dit takes labels"):
        train.run(tiny(model=slot("models", "dit")), tmp_path / "c")
    other = tmp_path / "other"
    other.mkdir()
    captioned.write_encoder(other)
    merges = (other / "merges.txt").read_text().rstrip().rpartition("\n")[0]
    (other / "merges.txt").write_text(merges)
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        train.run(tiny(text_encoder__file=str(other)), tmp_path / "d")
    about = json.loads((straight[0] / "config.json").read_text())
    assert about["text_encoder"]["name"] == "clip_text"

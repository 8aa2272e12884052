"""CLIP's text encoder equals that of transformers (tests/data/clip_text), and what does not fit is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diversedit_jax.errors import ConfigError
from diversedit_jax.models import clip_text
from diversedit_jax.weights.clip_text import open_text_encoder
from tests import ROOT

FOLDER = ROOT / "tests" / "data" / "clip_text"


@pytest.fixture(scope="module")
def gold():
    return dict(np.load(ROOT / "tests" / "data" / "clip_text.npz"))


@pytest.fixture(scope="module")
def opened():
    release = open_text_encoder(FOLDER)
    return release.arch, release.read()


def test_features_equal_those_of_transformers(gold, opened):
    arch, params = opened
    text = jax.jit(clip_text.network(arch).apply)(params, jnp.asarray(gold["input_ids"]))
    np.testing.assert_allclose(text.tokens, gold["last_hidden_state"], atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(text.pooled, gold["pooler_output"], atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(text.projected, gold["text_embeds"], atol=2e-6, rtol=2e-5)


def test_a_token_sees_itself_and_those_before(gold, opened):
    arch, params = opened
    ids = jnp.asarray(gold["input_ids"])
    encode = clip_text.network(arch).apply
    other = encode(params, ids.at[:, 9].set(3)).tokens
    np.testing.assert_array_equal(other[:, :9], encode(params, ids).tokens[:, :9])
    assert not np.allclose(other[:, 9:], encode(params, ids).tokens[:, 9:])
    np.testing.assert_allclose(encode(params, ids[:, :9]).tokens, other[:, :9], atol=2e-6)


def test_the_end_token_of_published_configs_is_the_largest_id(gold, opened):
    arch, params = opened
    ids = jnp.asarray(gold["input_ids"])
    published = clip_text.network(arch._replace(end=clip_text.LARGEST_ID)).apply(params, ids)
    np.testing.assert_allclose(published.pooled, gold["pooler_output"], atol=2e-6, rtol=2e-5)


def test_a_whole_clip_and_one_without_projection_are_read(gold, tmp_path):
    arrays = load_file(FOLDER / "model.safetensors")
    config = json.loads((FOLDER / "config.json").read_text())
    whole = arrays | {"vision_model.x": np.zeros(3, np.float32), "logit_scale": np.float32(1).reshape(1)}
    for name, held, about in (
        ("whole", whole, {"text_config": config}),
        ("bare", {key: value for key, value in arrays.items() if key != "text_projection.weight"}, config),
    ):
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(about))
        release = open_text_encoder(tmp_path / name)
        text = clip_text.network(release.arch).apply(release.read(), jnp.asarray(gold["input_ids"]))
        np.testing.assert_allclose(text.tokens, gold["last_hidden_state"], atol=2e-6, rtol=2e-5)
        assert (text.projected is None) == (name == "bare")


def test_what_does_not_fit_is_named(tmp_path, opened):
    arch, params = opened
    with pytest.raises(ConfigError, match="a text has 17 tokens, the encoder takes at most 16"):
        clip_text.network(arch).apply(params, jnp.zeros((1, 17), jnp.int32))
    shutil.copytree(FOLDER, tmp_path / "one")
    arrays = load_file(FOLDER / "model.safetensors")
    del arrays["text_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(arrays, tmp_path / "one" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the array text_model.encoder.layers.1.mlp.fc2.bias \[36\] is missing"):
        open_text_encoder(tmp_path / "one")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"clip_text: these are not its arrays \(x, ...\)"):
        open_text_encoder(tmp_path / "other.safetensors")

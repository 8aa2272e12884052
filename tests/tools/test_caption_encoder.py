"""The text encoder of the captioned digits: the shipped files are those of the tool, and they know the captions."""

import jax
import numpy as np
import pytest

from diversedit_jax.data import captioned_digits
from diversedit_jax.data.captioned_digits import COMBINATIONS, FULL, LENGTH, TEXT_ENCODER
from diversedit_jax.data.clip_tokenizer import FILES, open_tokenizer
from diversedit_jax.models import clip_text
from diversedit_jax.weights.clip_text import open_text_encoder
from tools.studies import caption_encoder


def test_pairs_are_merged_until_words_are_one_token():
    assert caption_encoder.merges(["low", "lower", "slow", "a"]) == [
        ("l", "o"),
        ("lo", "w</w>"),
        ("e", "r</w>"),
        ("lo", "w"),
        ("low", "er</w>"),
        ("s", "low</w>"),
    ]
    assert caption_encoder.merged(("a", "a", "a"), ("a", "a")) == ("aa", "a")


def test_the_shipped_vocabulary_is_that_of_the_captions(tmp_path):
    count = caption_encoder.write_vocabulary(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TEXT_ENCODER / name).read_bytes()
    assert caption_encoder.architecture(count) == open_text_encoder(TEXT_ENCODER).arch


def texts_of(forms):
    """The unit vectors of captions by the shipped encoder, [320 forms k]."""
    release, words = open_text_encoder(TEXT_ENCODER), open_tokenizer(TEXT_ENCODER, LENGTH)
    ids = np.stack([words(captioned_digits.captions(one)[:forms]).ids for one in COMBINATIONS])
    encode = jax.jit(clip_text.network(release.arch).apply)
    found = np.asarray(encode(release.read(), ids.reshape(-1, LENGTH)).projected).reshape(len(ids), forms, -1)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def test_the_shipped_encoder_knows_that_captions_mean_the_same():
    texts = texts_of(FULL)
    held_out = captioned_digits.held_out(COMBINATIONS)
    for form in range(1, FULL):
        right = (texts[:, form] @ texts[:, 0].T).argmax(axis=1) == np.arange(len(COMBINATIONS))
        assert right[~held_out].mean() > 0.95, f"form {form}"
        assert right[held_out].mean() > 0.9, f"form {form}, never seen with an image"


def test_the_shipped_encoder_is_small():
    assert sum(path.stat().st_size for path in TEXT_ENCODER.iterdir()) < 300_000


@pytest.mark.slow
def test_the_tool_writes_what_we_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(caption_encoder, "STEPS", 300)
    caption_encoder.main([str(tmp_path / "encoder")])
    said = capsys.readouterr().out
    share = float(said.split("finds the caption of ")[1].split("%")[0])
    assert share > 10, f"{said}: by chance it would be 0.3%, 1 of 320"
    release = open_text_encoder(tmp_path / "encoder")
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    assert jax.tree.map(np.shape, release.read()) == jax.tree.map(np.shape, open_text_encoder(TEXT_ENCODER).read())

"""CLIP's tokenizer gives the ids of both of transformers', and names files that do not fit."""

import json
import shutil

import numpy as np
import pytest

from diversedit_jax.data.clip_tokenizer import digest, open_tokenizer
from diversedit_jax.errors import ConfigError, DataError
from tests import ROOT

FOLDER = ROOT / "tests" / "data" / "clip_tokenizer"
CASES = json.loads((FOLDER / "cases.json").read_text())


@pytest.mark.parametrize("length", [16, 77])
@pytest.mark.parametrize("kind", ["slow_with_ftfy", "fast"])
def test_every_text_has_the_ids_of_transformers(kind, length):
    tokens = open_tokenizer(FOLDER, length)(CASES["texts"])
    np.testing.assert_array_equal(tokens.ids, CASES[kind][str(length)])
    assert tokens.ids.dtype == np.int32


def test_what_is_cut_is_told():
    tokenizer = open_tokenizer(FOLDER, 16)
    tokens = tokenizer(["", "the " * 14, "the " * 15, "the " * 300])
    assert tokens.cut.tolist() == [False, False, True, True]
    assert (tokens.ids[:, 0] == tokenizer.start).all()
    assert (tokens.ids[:, -1] == tokenizer.end).all()
    assert (tokens.ids[0, 1:] == tokenizer.end).all()
    assert tokenizer.size == 535


def test_a_pipeline_has_it_in_a_subfolder(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "tokenizer")
    np.testing.assert_array_equal(open_tokenizer(tmp_path)(["a cat"]).ids, open_tokenizer(FOLDER)(["a cat"]).ids)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("vocab.json", None, "has no vocab.json: wanted vocab.json and merges.txt"),
        ("vocab.json", "{", "vocab.json"),
        ("vocab.json", '["a"]', "vocab.json: it is no table of words and numbers"),
        ("vocab.json", '{"a": 0}', r"has no <\|startoftext\|>: it is not CLIP's"),
        ("vocab.json", {"a": 535}, r"its numbers are not 0 .. 534, as its 535 words need"),
        ("vocab.json", {"!": 1}, r"its numbers are not 0 .. 534"),
        ("vocab.json", {"!": None}, r"it has no '!', and 0 other bytes are missing: it is not CLIP's"),
        ("merges.txt", "#version: 0.2\na b c\n", "'a b c' is no pair"),
        ("merges.txt", "#version: 0.2\nqq zz\n", "merges.txt|vocabulary|out of"),
        ("merges.txt", b"\xff\xfe", "utf-8"),
    ],
)
def test_files_that_do_not_fit_are_named(file, content, said, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "one")
    path = tmp_path / "one" / file
    if isinstance(content, dict):
        words = json.loads(path.read_text()) | content
        kept = [word for word in words if words[word] is not None]
        content = json.dumps(words if len(kept) == len(words) else {word: i for i, word in enumerate(kept)})
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        open_tokenizer(tmp_path / "one")


def test_the_digest_is_that_of_the_content(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "tokenizer")
    vocabulary = json.loads((FOLDER / "vocab.json").read_text())
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(dict(reversed(vocabulary.items())), indent=2))
    same = digest(FOLDER)
    assert open_tokenizer(FOLDER).sha256 == digest(tmp_path) == same
    merges = (FOLDER / "merges.txt").read_text()
    (tmp_path / "tokenizer" / "merges.txt").write_text(merges.rstrip().rpartition("\n")[0])
    assert digest(tmp_path) != same


def test_ids_are_read_as_texts():
    tokenizer = open_tokenizer(FOLDER)
    texts = ["a small red seven, at the top left", "naïve 🎉", ""]
    assert tokenizer.texts(tokenizer(texts).ids) == texts


def test_a_length_without_room_is_refused():
    with pytest.raises(ConfigError, match="tokenizer: length = 2: must be at least 3"):
        open_tokenizer(FOLDER, 2)

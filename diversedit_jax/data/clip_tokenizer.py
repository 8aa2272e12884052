"""CLIP's tokenizer: texts to token ids, from the published vocab.json and merges.txt.

Texts are lower-cased, blanks are one blank, and byte pairs are merged (arXiv 2103.00020). A text begins with the start
token and ends with the end token, which also fills the places behind it.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from diversedit_jax.data import local_path
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.reading import RegularFile, read_json
from diversedit_jax.registry import in_range

FILES = ("vocab.json", "merges.txt")
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
BLANK = "\u0120"  # a blank in the alphabet of bytes
LENGTH = 77  # places of the published text encoders
# Endings of English contractions, words, single digits, and runs of anything else.
PARTS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokens(NamedTuple):
    """Texts as ids. cut: whether a text had more tokens than places; the last ones are lost."""

    ids: Int[np.ndarray, "b n"]
    cut: Bool[np.ndarray, " b"]


class Tokenizer:
    """Texts -> Tokens, int32.

    size: of the vocabulary. length: places of a text. start, end: ids of these tokens. sha256: see `digest`.
    """

    def __init__(self, words: Any, vocabulary: dict[str, int], length: int, sha256: str):
        self._words, self.size, self.length, self.sha256 = words, len(vocabulary), length, sha256
        self.start, self.end = vocabulary[START], vocabulary[END]

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into ids. An empty text is the start token and end tokens."""
        found = [one.ids for one in self._words.encode_batch(list(texts), add_special_tokens=False)]
        ids = np.full((len(found), self.length), self.end, np.int32)
        ids[:, 0] = self.start
        for row, words in zip(ids, found, strict=True):
            row[1 : 1 + len(words)][: self.length - 2] = words[: self.length - 2]
        return Tokens(ids, np.array([len(words) > self.length - 2 for words in found], bool))

    def texts(self, ids: Int[np.ndarray, "b n"]) -> list[str]:
        """The texts of ids, in lower case. Of punctuation, only the commonest is without a blank before it."""
        found = []
        for row in ids.tolist():
            words = row[1 : row.index(self.end) if self.end in row else None]
            pieces = [self._words.id_to_token(word).replace(WORD_END, BLANK) for word in words]
            found.append(re.sub(r" ([.,:;!?])", r"\1", self._words.decoder.decode(pieces).strip()))
        return found


def place_of(folder: str | Path) -> Path:
    """The folder that holds the files: `folder`, or its subfolder `tokenizer`."""
    place = local_path("tokenizer", folder)
    return place / "tokenizer" if (place / "tokenizer").is_dir() else place


def holds(folder: str | Path) -> bool:
    """Whether a folder holds the files."""
    return all((place_of(folder) / name).is_file() for name in FILES)


def digest(folder: str | Path) -> str:
    """A name for the tokenizer in a folder that holds the files, sha256 in hex: equal for files of equal content."""
    return _digest(*_content(folder))


def _digest(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps([vocabulary, merges], sort_keys=True).encode()).hexdigest()


def open_tokenizer(folder: str | Path, length: int = LENGTH) -> Tokenizer:
    """The tokenizer in a folder with vocab.json and merges.txt, or in its subfolder `tokenizer`.

    length: places of a text, as many as the text encoder has.
    Raises ConfigError if the library is missing, DataError for files that are missing, damaged or do not fit.
    """
    in_range("tokenizer: length", length, 3)
    try:
        import tokenizers  # here, because only texts need it
    except ImportError:
        raise ConfigError("tokenizer: tokenizers is not installed: pip install diversedit_jax[text]") from None
    vocabulary, merges = _content(folder)
    # a byte without a token would become the end of the text
    alphabet = [byte + end for byte in tokenizers.pre_tokenizers.ByteLevel.alphabet() for end in ("", WORD_END)]
    if missing := sorted(set(alphabet) - vocabulary.keys()):
        why = f"it has no {missing[0]!r}, and {len(missing) - 1} other bytes are missing: it is not CLIP's"
        raise DataError(f"tokenizer: {place_of(folder) / FILES[0]}: {why}")
    try:
        model = tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END, unk_token=END)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise _damaged(place_of(folder) / FILES[1], error) from error
    words, forms, cuts = tokenizers.Tokenizer(model), tokenizers.normalizers, tokenizers.pre_tokenizers
    words.normalizer = forms.Sequence([forms.NFC(), forms.Replace(tokenizers.Regex(r"\s+"), " "), forms.Lowercase()])
    split = cuts.Split(tokenizers.Regex(PARTS), "removed", invert=True)
    words.pre_tokenizer = cuts.Sequence([split, cuts.ByteLevel(add_prefix_space=False)])
    words.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(words, vocabulary, length, _digest(vocabulary, merges))


def _content(folder: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges in the files of a folder. DataError for files that are missing or damaged."""
    place = place_of(folder)
    for name in FILES:
        if not (place / name).is_file():
            raise DataError(f"tokenizer: {place} has no {name}: wanted {' and '.join(FILES)}")
    file = FILES[0]
    try:
        vocabulary = read_json(place / file)
        if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
            raise ValueError("it is no table of words and numbers")
        if missing := [word for word in (START, END) if word not in vocabulary]:
            raise ValueError(f"it has no {missing[0]}: it is not CLIP's")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"its numbers are not 0 .. {len(vocabulary) - 1}, as its {len(vocabulary)} words need")
        file = FILES[1]
        with RegularFile(place / file) as opened:
            lines = opened.read().decode().splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if wrong := [merge for merge in merges if len(merge) != 2]:
            raise ValueError(f"{' '.join(wrong[0])[:80]!r} is no pair")
    except (OSError, ValueError) as error:
        raise _damaged(place / file, error) from error
    return vocabulary, merges


def _damaged(file: Path, error: Exception) -> DataError:
    check_machine(error)
    return DataError(f"tokenizer: {file}: {' '.join(str(error).split())[:200]}")

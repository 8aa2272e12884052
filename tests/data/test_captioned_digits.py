"""Captioned digits: what is held out, how an image is drawn, and captions whose words are tokens."""

import itertools
import json

import numpy as np
import pytest

from diversedit_jax import data
from diversedit_jax.data import captioned_digits, digits
from diversedit_jax.data.captioned_digits import ATTRIBUTES, COLOURS, COMBINATIONS, FULL, LENGTH, TEXT_ENCODER
from diversedit_jax.data.clip_tokenizer import open_tokenizer
from diversedit_jax.errors import ConfigError

SEVEN = np.array([7, 0, 0, 0])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def splits(data_dir):
    return {split: data.make("captioned_digits", split, data_dir=data_dir) for split in captioned_digits.SPLITS}


def test_a_fifth_of_the_combinations_is_held_out_and_every_triple_is_seen():
    assert len(np.unique(COMBINATIONS, axis=0)) == 10 * 4 * 2 * 4
    held_out = captioned_digits.held_out(COMBINATIONS)
    assert held_out.sum() == 64
    for size, most in ((1, 0.22), (2, 0.25), (3, 0.5)):
        for axes in itertools.combinations(range(4), size):
            _, group = np.unique(COMBINATIONS[:, axes], axis=0, return_inverse=True)
            share = np.bincount(group, held_out) / np.bincount(group)
            assert share.max() <= most, f"{axes}: some values hardly occur in training"


def test_splits_have_other_digits_and_other_combinations(splits):
    train, test, held_out = (splits[split].source for split in ("train", "test", "held_out"))
    assert [len(one) for one in (train, test, held_out)] == [36790, 9216, 2304]
    assert {len(one.digits[0]) for one in (test, held_out)} == {360}
    ours, theirs = ({image.tobytes() for image in one.digits[0]} for one in (train, test))
    assert not ours & theirs
    seen, other, never = ({tuple(row) for row in one.attributes} for one in (train, test, held_out))
    assert seen == other
    assert not seen & never
    assert len(seen | never) == 320
    pairs = [np.column_stack([one.rows, one.attributes]) for one in (train, test, held_out)]
    assert all(len(np.unique(one, axis=0)) == len(one) for one in pairs), "no example is there twice"


def test_examples_are_the_same_each_time(splits, data_dir):
    again = data.make("captioned_digits", "test", data_dir=data_dir).source
    for i in (0, 5000):
        for one, other in zip(splits["test"].source[i].values(), again[i].values(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("place", "rows", "columns"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)])
@pytest.mark.parametrize("size", [0, 1])
def test_a_digit_lies_in_its_corner_and_has_its_colour(splits, data_dir, size, place, rows, columns):
    source = splits["train"].source
    i = int(np.flatnonzero((source.attributes[:, 2:] == (size, place)).all(axis=1))[0])
    side = (8, 12)[size]
    x = source[i]["x"]
    assert (x.dtype, x.shape, x.min()) == (np.float32, (16, 16, 3), -1)
    inside = x[(16 - side) * rows :, (16 - side) * columns :][:side, :side]
    outside = np.ones(x.shape[:2], bool)
    outside[(16 - side) * rows :, (16 - side) * columns :][:side, :side] = False
    assert (x[outside] == -1).all()
    digit, colour = source.attributes[i, :2]
    light = ((inside + 1) / 2).max(axis=2) / COLOURS[colour].max()
    np.testing.assert_allclose((inside + 1) / 2, light[..., None] * COLOURS[colour], atol=1e-6)
    levels, labels = digits.levels("train", data_dir)
    assert labels[source.rows[i]] == digit
    if size == 0:
        np.testing.assert_allclose(16 * light, levels[source.rows[i], ..., 0], atol=1e-5)
    else:
        assert 16 * light.sum() / levels[source.rows[i]].sum() == pytest.approx(1.5**2, rel=0.05)


def test_the_captions_of_a_combination():
    assert captioned_digits.captions(SEVEN) == [
        "a small red seven at the top left",
        "top left: a red 7, small",
        "a red 7, little, upper left",
        "the little seven at the upper left is red",
        "small red 7 in the top left corner",
        "at the upper left, a seven that is small and red",
        "number 7 in red, little, at the top left",
        "red digit seven, little, top left",
        "a red seven",
    ]
    texts = [text for attributes in COMBINATIONS for text in captioned_digits.captions(attributes)[:FULL]]
    assert len(set(texts)) == len(texts), "a caption says every attribute"


def test_each_word_is_a_token_and_tokens_are_the_words_again():
    words = open_tokenizer(TEXT_ENCODER, LENGTH)
    texts = [text for attributes in COMBINATIONS for text in captioned_digits.captions(attributes)]
    tokens = words([*texts, "a nonplussed rhinoceros"])
    assert not tokens.cut[:-1].any()
    names = {number: word for word, number in json.loads((TEXT_ENCODER / "vocab.json").read_text()).items()}
    assert sorted(names) == list(range(words.size))
    for text, ids in zip(texts, tokens.ids[:-1], strict=True):
        spelled = "".join(
            names[number].replace("</w>", " ") for number in ids if number not in (words.start, words.end)
        )
        assert spelled.replace(" ,", ",").replace(" :", ":").strip() == text
        parts = text.replace(",", " ,").replace(":", " :").split()
        assert (ids != words.end).sum() == 1 + len(parts), f"{text}: a word is more than one token"


def test_a_caption_is_drawn_and_the_others_are_left_out(splits):
    dataset = splits["train"]
    example = dataset.source[3]
    assert example["captions"].shape == (9, LENGTH)
    np.testing.assert_array_equal(example["y"], example["captions"][0])
    found = {dataset.transform(example, np.random.default_rng(i))["y"].tobytes() for i in range(100)}
    assert found == {ids.tobytes() for ids in example["captions"]}
    assert set(dataset.transform(example, np.random.default_rng(0))) == {"x", "y"}
    null, words = dataset.space.conditions.null, open_tokenizer(TEXT_ENCODER, LENGTH)
    assert null.tolist() == [words.start, *[words.end] * (LENGTH - 1)]
    assert dataset.space.conditions.classes is None


def test_the_first_caption_says_the_attributes(splits):
    source, words = splits["held_out"].source, open_tokenizer(TEXT_ENCODER, LENGTH)
    for i in range(50):
        chosen = zip(ATTRIBUTES.values(), source.attributes[i], strict=True)
        digit, colour, size, place = (names[value][0] for names, value in chosen)
        text = f"a {size} {colour} {digit} at the {place}"
        np.testing.assert_array_equal(source[i]["y"], words([text]).ids[0])


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="captioned_digits: split = 'heldout' is unknown; did you mean 'held_out'"):
        data.make("captioned_digits", "heldout")

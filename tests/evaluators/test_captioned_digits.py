"""The judge of captioned digits: real images score high, a wrong attribute scores 0, other data are refused."""

from functools import partial

import numpy as np
import pytest

from diversedit_jax import data, evaluators
from diversedit_jax.data.captioned_digits import ATTRIBUTES, FULL, SHAPE
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec

NAMES = (*ATTRIBUTES, "all")
NUM = 300


@pytest.fixture(scope="module")
def open_split(tmp_path_factory):
    return partial(data.make, "captioned_digits", data_dir=str(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def judge(open_split):
    return evaluators.make("captioned_digits", SampleSpec(SHAPE, 100, None, None, open_split), num=NUM)


def real(open_split, wrong=None):
    """A perfect generator: an image for each caption; or with the next value of the attribute `wrong`."""
    splits = [open_split(split).source for split in ("train", "held_out")]
    images = {}
    for source in splits:
        for i in range(4000 if len(source) > 4000 else len(source)):
            images[tuple(source.attributes[i])] = source[i]["x"]
    tokens = splits[0].tokens
    meant = {ids.tobytes(): place[:4] for place in np.ndindex(tokens.shape[:5]) for ids in [tokens[place]]}

    def sample(ids, first=0):
        asked = np.array([meant[row.tobytes()] for row in ids])
        if wrong is not None:
            asked[:, wrong] = (asked[:, wrong] + 1) % tokens.shape[wrong]
        return np.round((np.stack([images[tuple(row)] for row in asked]) + 1) * 127.5).astype(np.uint8)

    return sample


def test_real_images_are_what_their_captions_say(judge, open_split):
    values = dict(judge(real(open_split)))
    assert list(values) == [f"{part}/{name}" for part in ("seen", "held_out", "real") for name in NAMES]
    assert all(type(value) is float for value in values.values())
    assert min(values.values()) > 0.97
    assert min(values[f"real/{name}"] for name in ("colour", "size", "place")) > 0.995


@pytest.mark.parametrize("wrong", range(4))
def test_one_wrong_attribute_is_seen_and_the_others_are_still_right(judge, open_split, wrong):
    values = dict(judge(real(open_split, wrong)))
    for part in ("seen", "held_out"):
        for axis, name in enumerate(ATTRIBUTES):
            assert values[f"{part}/{name}"] < 0.02 if axis == wrong else values[f"{part}/{name}"] > 0.96
        assert values[f"{part}/all"] < 0.02


def test_noise_is_at_chance(judge):
    rng = np.random.default_rng(0)
    values = dict(judge(lambda ids, first: rng.integers(0, 256, (len(ids), *SHAPE), dtype=np.uint8)))
    assert values["seen/digit"] < 0.2
    assert values["seen/colour"] < 0.4
    assert values["seen/place"] < 0.4
    assert values["seen/all"] < 0.05


def test_what_is_asked_of_the_samples(judge, open_split):
    asked = []

    def sample(ids, first):
        asked.append((ids, first))
        return np.zeros((len(ids), *SHAPE), np.uint8)

    dict(judge(sample))
    assert [first for _, first in asked] == [0, NUM]
    for (ids, _), split in zip(asked, ("test", "held_out"), strict=True):
        source = open_split(split).source
        assert (ids.dtype, ids.shape) == (np.int32, (NUM, 16))
        for i in range(20):
            np.testing.assert_array_equal(ids[i], source.tokens[tuple(source.attributes[i])][i % FULL])


@pytest.mark.parametrize(("shape", "given"), [(None, "latents"), ((8, 8, 1), r"\(8, 8, 1\)")])
def test_samples_of_another_kind_are_refused_at_once(shape, given):
    with pytest.raises(ConfigError, match=rf"the samples are {given}, wanted images \(16, 16, 3\)"):
        evaluators.make("captioned_digits", SampleSpec(shape, 100, None, None, None))


def test_other_data_are_refused_at_once():
    other = partial(data.make, "synthetic", shape=SHAPE, size=4)
    with pytest.raises(ConfigError, match=r"the run has other data: it judges config\.data\.name = 'captioned_digits'"):
        evaluators.make("captioned_digits", SampleSpec(SHAPE, 100, None, None, other))


@pytest.mark.parametrize("num", [0, 2305])
def test_the_number_of_samples_has_a_range(num):
    with pytest.raises(ConfigError, match=f"captioned_digits: num = {num}: must be"):
        evaluators.make("captioned_digits", SampleSpec(SHAPE, 100, None, None, None), num=num)

"""Moving digits: every example is a digit at constant velocity between walls, and its class says which and where to."""

import numpy as np
import pytest

from diversedit_jax import data
from diversedit_jax.data import digits
from diversedit_jax.data.moving_digits import CLASSES, PATHS, SHAPE
from diversedit_jax.errors import ConfigError

SOME = 300


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def splits(data_dir):
    return {split: data.make("moving_digits", split, data_dir=data_dir) for split in ("train", "test")}


def walked(place, velocity):
    """The path of a point between two walls, step by step. At a wall it turns round."""
    places = [place]
    for _ in range(7):
        place += velocity
        velocity = abs(velocity) if place == 0 else -abs(velocity) if place == 8 else velocity
        places.append(place)
    return places


def test_paths_have_constant_velocity_and_bounce():
    assert PATHS.tolist() == [walked(8, -2), walked(0, 2)]


def test_an_example_is_its_digit_in_every_frame(splits, data_dir):
    for split, dataset in splits.items():
        levels, labels = digits.levels(split, data_dir)
        known = {level.tobytes(): label for level, label in zip(levels, labels, strict=True)}
        for i in range(SOME):
            x, y = (dataset.source[i][name] for name in ("x", "y"))
            assert (x.dtype, x.shape, y.dtype) == (np.float32, SHAPE, np.int32)
            grey = np.round((x + 1) * 8).astype(np.uint8)
            np.testing.assert_array_equal(grey / 8 - 1, x)
            rows = [np.flatnonzero(frame.any(axis=(1, 2))) for frame in grey]
            tops = [row[0] if row[-1] - row[0] == 7 else None for row in rows]
            digit = int(CLASSES[y].split()[0])
            found = set()
            for frame, top in zip(grey, tops, strict=True):
                assert top is not None, "each row of a digit has light"
                windows = {left: frame[top : top + 8, left : left + 8] for left in range(9)}
                whole = [w for w in windows.values() if w.sum() == frame.sum() and known.get(w.tobytes()) == digit]
                assert whole, "nothing else is in the frame"
                found.add(whole[0].tobytes())
            assert len(found) == 1


def test_the_class_says_where_the_light_goes_first(splits):
    for dataset in splits.values():
        examples = [dataset.source[i] for i in range(SOME)]
        light = np.stack([one["x"][..., 0] + 1 for one in examples]).astype(np.float64)
        centre = np.stack([(light * np.arange(16)[:, None]).sum((2, 3)), (light * np.arange(16)).sum((2, 3))], axis=-1)
        centre /= light.sum((2, 3))[..., None]
        moved = centre[:, 1] - centre[:, 0]
        for one, (down, right) in zip(examples, moved, strict=True):
            _, row, column = CLASSES[one["y"]].split()
            assert (row, column) == ("down" if down > 1.9 else "up", "right" if right > 1.9 else "left")
            assert (abs(down), abs(right)) == pytest.approx((2, 2))
    assert CLASSES[3 * 4] == "3 up left"
    assert len(set(CLASSES)) == 40


def test_splits_have_other_digits_and_every_class(splits):
    train, test = (splits[split].source for split in ("train", "test"))
    assert (len(train), len(test)) == (1437 * 4, 360 * 4)
    assert not {one.tobytes() for one in train.digits} & {one.tobytes() for one in test.digits}
    for source in (train, test):
        assert len(np.unique(source.order)) == len(source.order)
        counts = np.bincount([source[i]["y"] for i in range(1000)], minlength=40)
        assert counts.min() > 0, "they are not in order of their classes"


def test_examples_are_the_same_each_time(splits, data_dir):
    again = data.make("moving_digits", "train", data_dir=data_dir)
    for i in (0, 5000, 5747):
        for name in ("x", "y"):
            np.testing.assert_array_equal(again.source[i][name], splits["train"].source[i][name])
    assert again.transform is None


def test_the_space_is_of_videos(splits):
    space = splits["train"].space
    assert (space.shape, space.video) == (SHAPE, True)
    assert (space.conditions.classes, space.conditions.names) == (40, CLASSES)


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split = 'held_out' is unknown"):
        data.make("moving_digits", "held_out")

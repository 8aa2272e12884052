"""The judge of moving digits: real videos score high, and what is wrong in a video is what scores low."""

from functools import partial

import jax
import numpy as np
import pytest

from diversedit_jax import data, evaluators
from diversedit_jax.data.moving_digits import PATHS, SHAPE
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors
from diversedit_jax.evaluation.extractors.moving_digits import first
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.evaluators.moving_digits import NAMES, distance_to_paths

NUM = 400


@pytest.fixture(scope="module")
def open_split(tmp_path_factory):
    return partial(data.make, "moving_digits", data_dir=str(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def judge(open_split):
    return evaluators.make("moving_digits", SampleSpec(SHAPE, 100, None, None, open_split), num=NUM)


@pytest.fixture(scope="module")
def real(open_split):
    """Videos of each class in turn, of digits that the judge was not fitted to, and not those of its `real` scores."""
    source = open_split("test").source
    by_class = {}
    for i in range(NUM, len(source)):
        by_class.setdefault(int(source[i]["y"]), []).append(i)
    chosen = [by_class[i % 40][i // 40] for i in range(NUM)]
    return first([source[i] for i in chosen], NUM)


def scores(judge, videos):
    def sample(labels):
        np.testing.assert_array_equal(labels, np.arange(NUM) % 40)
        return videos

    return dict(judge(sample))


@pytest.fixture(scope="module")
def right(judge, real):
    return scores(judge, real)


def test_real_videos_are_what_their_classes_say(right):
    accuracies = [*NAMES, "all", *(f"real/{name}" for name in (*NAMES, "all"))]
    distances = ["frechet_frame", "frechet_clip", "frechet_frame_floor", "frechet_clip_floor"]
    assert sorted(right) == sorted(accuracies + distances)
    assert all(type(value) is float for value in right.values())
    assert min(right[name] for name in accuracies) > 0.98
    assert min(right[name] for name in ("same", "direction", "motion")) == 1
    for name in distances[:2]:  # of ten sets of 400 held-out videos, the farthest was at 2.1 times the nearest
        assert 0.4 < right[name] / right[f"{name}_floor"] < 2.5, "as far as other held-out videos"


def test_shuffled_frames_do_not_move_as_in_the_data(judge, real, right):
    found = scores(judge, real[:, [2, 0, 5, 1, 7, 4, 3, 6]])
    assert (found["digit"], found["same"]) == (right["digit"], right["same"])
    assert found["motion"] == found["all"] == 0
    assert found["direction"] < 0.4
    assert found["frechet_frame"] == pytest.approx(right["frechet_frame"], rel=1e-6)
    assert found["frechet_clip"] > 3 * right["frechet_clip"]


def test_the_opposite_direction_is_seen(judge, real, right):
    """Turned by half a turn, a video has the opposite direction. Its digit is upside down."""
    found = scores(judge, real[:, :, ::-1, ::-1])
    assert found["direction"] == found["all"] == 0
    assert (found["motion"], found["same"]) == (1, pytest.approx(1, abs=0.01))
    assert scores(judge, real[:, ::-1])["motion"] == 0, "backwards it starts elsewhere"


def test_another_digit_is_seen(judge, real, right):
    found = scores(judge, np.roll(real, 4, axis=0))  # of the class before, with the same directions
    assert found["digit"] < 0.02
    assert (found["direction"], found["motion"], found["same"]) == (1, 1, 1)
    half = real.copy()
    moved = np.roll(real, 4, axis=0)
    half[:, 5:] = moved[:, 5:]
    found = scores(judge, half)
    assert found["digit"] == pytest.approx(right["digit"], abs=0.01)
    assert found["same"] < 0.02


def test_a_path_through_a_wall_or_with_a_jump_is_no_motion():
    path = PATHS[1] + 3.5
    assert path.tolist() == [3.5, 5.5, 7.5, 9.5, 11.5, 9.5, 7.5, 5.5]
    jumped, early, slow = path.copy(), np.where(path > 11, 10.4, path), 3.5 + np.arange(8) / 2
    jumped[3] += 1.5
    far = distance_to_paths(np.stack([path, path + 0.4, path + 1, path + 1.3, jumped, early, slow, path * 0 + 7.5]))
    np.testing.assert_allclose(far[:4], [0, 0, 0, 0.3], atol=1e-9)
    assert far[4:].min() >= 0.5


def test_noise_and_darkness_are_nothing(judge):
    noise = scores(judge, np.random.default_rng(0).integers(0, 256, (NUM, *SHAPE), dtype=np.uint8))
    assert noise["digit"] < 0.3
    assert noise["motion"] == noise["all"] == 0
    assert scores(judge, np.zeros((NUM, *SHAPE), np.uint8))["motion"] == 0
    assert noise["frechet_frame"] > 1


@pytest.mark.parametrize(("shape", "given"), [(None, "latents"), ((8, 8, 1), r"\(8, 8, 1\)")])
def test_samples_of_another_kind_are_refused_at_once(shape, given):
    with pytest.raises(ConfigError, match=rf"the samples are {given}, wanted videos \(8, 16, 16, 1\)"):
        evaluators.make("moving_digits", SampleSpec(shape, 100, None, None, None))


def test_other_data_are_refused_at_once():
    other = partial(data.make, "synthetic", shape=SHAPE, size=4)
    with pytest.raises(ConfigError, match=r"the run has other data: it judges config\.data\.name = 'moving_digits'"):
        evaluators.make("moving_digits", SampleSpec(SHAPE, 100, None, None, other))


@pytest.mark.parametrize("num", [99, 1441])
def test_the_number_of_samples_has_a_range(num):
    with pytest.raises(ConfigError, match=f"moving_digits: num = {num}: must be"):
        evaluators.make("moving_digits", SampleSpec(SHAPE, 100, None, None, None), num=num)


def test_the_feature_network_takes_videos_alone(open_split):
    one = extractors.make("moving_digits")
    videos = first(open_split("test").source, 8)
    apply = jax.jit(one.apply)
    pool = np.asarray(apply(one.init(), videos).pool)
    assert pool.shape == (8, 96)
    other = np.asarray(apply(one.init(), videos[:, ::-1]).pool)
    assert np.abs(pool - other).max() > 0.1 * np.abs(pool).max(), "they depend on the order of frames"
    with pytest.raises(ConfigError, match=r"moving_digits: wanted videos \[b 8 16 16 1\], given \[8, 16, 16, 1\]"):
        apply(one.init(), videos[0])

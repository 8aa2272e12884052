"""The judge of digits: real digits score high, wrong labels and noise do not, and bad samples are refused."""

import numpy as np
import pytest
from sklearn.svm import SVC

from diversedit_jax import evaluators
from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec

SPEC = SampleSpec(digits.SHAPE, 100, None, None, None)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def judge(data_dir):
    return evaluators.make("digits", SPEC, num=500, data_dir=data_dir)


def real(data_dir, shift=0):
    """A perfect generator: training digits of the class asked for (plus `shift`), as uint8."""
    images, labels = digits.levels("train", data_dir)
    rows = [np.flatnonzero(labels == k) for k in range(10)]
    rng = np.random.default_rng(0)

    def sample(wanted):
        chosen = images[[rng.choice(rows[(k + shift) % 10]) for k in wanted]]
        return np.clip(np.round(chosen / 16 * 255), 0, 255).astype(np.uint8)

    return sample


def test_constants_are_those_of_the_real_digits(judge, data_dir):
    values = dict(judge(real(data_dir)))
    assert values["classifier_heldout_accuracy"] >= 0.98
    assert values["frechet_floor"] == pytest.approx(0.41, abs=0.02)
    assert set(values) == {"accuracy", "frechet", "classifier_heldout_accuracy", "frechet_floor"}
    assert all(type(value) is float for value in values.values())


def test_real_digits_are_near_the_floor_and_recognised(judge, data_dir):
    values = dict(judge(real(data_dir)))
    assert values["accuracy"] > 0.99
    assert values["frechet"] < 1.5 * values["frechet_floor"] + 0.3


def test_digits_of_the_wrong_class_are_seen(judge, data_dir):
    assert dict(judge(real(data_dir, shift=1)))["accuracy"] < 0.01


def test_noise_is_far_away(judge):
    rng = np.random.default_rng(0)
    values = dict(judge(lambda labels: rng.integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)))
    assert values["frechet"] > 20
    assert values["accuracy"] < 0.3


def test_labels_are_balanced_int32(judge, data_dir):
    asked = []

    def sample(labels):
        asked.append(labels)
        return real(data_dir)(labels)

    dict(judge(sample))
    assert asked[0].dtype == np.int32
    np.testing.assert_array_equal(np.bincount(asked[0]), 50)


def test_samples_are_rounded_to_the_levels_of_the_data(judge, data_dir):
    exact = dict(judge(real(data_dir)))
    sample = real(data_dir)
    off = dict(judge(lambda labels: (np.clip(sample(labels).astype(int) + 5, 0, 255)).astype(np.uint8)))
    assert off == exact


def test_the_classifier_is_fitted_once(data_dir, monkeypatch):
    fits = []
    fit = SVC.fit
    monkeypatch.setattr(SVC, "fit", lambda *args: fits.append(1) or fit(*args))
    run = evaluators.make("digits", SPEC, num=20, data_dir=data_dir)
    assert not fits, "nothing is fitted before the first run"
    for _ in range(2):
        dict(run(real(data_dir)))
    assert len(fits) == 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((500, 8, 8), np.uint8), r"are uint8 \(500, 8, 8\), wanted uint8 \(500, 8, 8, 1\)"),
        (np.zeros((499, 8, 8, 1), np.uint8), r"are uint8 \(499, 8, 8, 1\)"),
        (np.zeros((500, 8, 8, 1), np.float32), r"are float32 \(500, 8, 8, 1\), wanted uint8"),
        (np.full((500, 8, 8, 1), np.nan), r"are float64 \(500, 8, 8, 1\), wanted uint8"),
    ],
)
def test_samples_that_are_not_images_are_refused(judge, samples, message):
    with pytest.raises(ValueError, match=message):
        dict(judge(lambda labels: samples))


def test_one_sample_is_too_few():
    with pytest.raises(ConfigError, match="num = 1: must be at least 2"):
        evaluators.make("digits", SPEC, num=1)


@pytest.mark.parametrize(("shape", "given"), [(None, "latents"), ((16, 16, 1), r"\(16, 16, 1\)")])
def test_samples_of_another_kind_are_refused_at_once(shape, given):
    with pytest.raises(ConfigError, match=rf"the samples are {given}, wanted images \(8, 8, 1\)"):
        evaluators.make("digits", SPEC._replace(shape=shape))

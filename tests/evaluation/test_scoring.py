"""Scores from features: those of the definitions and of ADM's evaluator, whatever the batches and the devices."""

from pathlib import Path

import jax
import numpy as np
import pytest

from diversedit_jax import sharding
from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError, DataError, NonFiniteError
from diversedit_jax.evaluation import extractors, image_files, scoring
from diversedit_jax.evaluation.extractors import Extractor, Features
from diversedit_jax.evaluation.extractors.digits import as_bytes
from diversedit_jax.evaluation.reference_statistics import Reference, Statistics, open_reference
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.metrics.inception_score import inception_score, probabilities
from diversedit_jax.metrics.kernel_distance import kernel_distance
from diversedit_jax.metrics.precision_recall import precision_recall
from tests import DATA

ADM = np.load(DATA / "adm_metrics.npz")


@pytest.fixture(scope="module")
def network():
    return extractors.make("digits")


@pytest.fixture(scope="module")
def images():
    return as_bytes(digits.levels("test")[0])


def linear(name="inception", side=4, digest="ab", reference=None):
    """A feature network for tests: the pixels themselves, and the first four of them."""

    def apply(weights, images):
        pool = images.reshape(len(images), -1) * weights["scale"]
        return Features(pool, pool[:, :4])

    about = {"weights": {"digest": digest}}
    return Extractor(name, lambda: {"scale": np.float32(1 / 255)}, apply, about, reference)


def file_of(images):
    return image_files.of_array(Path("reference.npz"), images)


def random_images(count, seed=0, side=4):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def test_neither_batches_nor_devices_change_statistics(network, images):
    def statistics(layout, batch, sizes):
        extract = scoring.extraction([network], layout, batch)
        ends = np.cumsum(sizes)
        parts = [extract(images[end - size : end])["digits"] for size, end in zip(sizes, ends, strict=True)]
        return scoring.statistics_of("digits", parts)

    alone = sharding.make(devices=jax.devices()[:1])
    wanted = statistics(alone, 360, [360])
    for layout, batch, sizes in [
        (sharding.make(), 64, [64, 1, 63, 50, 64, 64, 54]),
        (sharding.make(data=4, fsdp=2), 360, [7, 353]),
        (alone, 100, [100, 100, 60, 100]),
    ]:
        found = statistics(layout, batch, sizes)
        for kind in ("pool", "spatial"):
            for given, want in zip(getattr(found, kind), getattr(wanted, kind), strict=True):
                np.testing.assert_allclose(given, want, rtol=0, atol=1e-10)


def test_equal_sets_have_no_distance(network, images):
    extract = scoring.extraction([network], sharding.make(), 360)
    parts = [extract(images)["digits"]]
    found = scoring.scores("digits", parts, scoring.statistics_of("digits", parts))
    assert found["fd_digits"] < 1e-6
    assert found["sfd_digits"] < 1e-6
    for name in ("precision", "recall", "precision_float16", "recall_float16"):
        assert found[f"{name}_digits"] == 1


def test_they_are_those_of_adm():
    reference = scoring.statistics_of("inception", [Features(ADM["ref"])])
    parts = [Features(part) for part in np.split(ADM["samples"], [100, 101, 400])]
    found = scoring.scores("inception", parts, reference)
    assert found["fid"] == pytest.approx(float(ADM["fid"]), rel=1e-6)
    assert found["precision_float16"] == pytest.approx(float(ADM["precision"][0]), abs=1e-8)
    assert found["recall_float16"] == pytest.approx(float(ADM["recall"][0]), abs=1e-8)
    kid = kernel_distance(ADM["ref"], ADM["samples"], subsets=100, subset_size=len(ADM["samples"]))
    assert (found["kid"], found["kid_std"]) == kid
    assert "sfid" not in found
    assert "inception_score" not in found


def test_names_tell_the_network_and_logits_give_an_inception_score():
    rng = np.random.default_rng(0)
    part = Features(*(rng.normal(size=(20, d)).astype(np.float32) for d in (3, 2, 5)))
    reference = scoring.statistics_of("toy", [part])
    found = scoring.scores("toy", [part], reference._replace(features=None))
    wanted = {"fd_toy", "sfd_toy", "inception_score_toy", "inception_score_toy_std"}
    assert found.keys() == wanted, "without features of the reference neither precision nor kernel distance"
    mean, _ = inception_score(probabilities(part.logits), 5000)
    assert found["inception_score_toy"] == pytest.approx(mean)
    assert {"fid", "sfid", "inception_score", "kid", "precision"} < scoring.scores(
        "inception", [part], reference
    ).keys()


def test_a_reference_is_completed_from_its_images():
    """ADM's file has statistics of all images, and 30 of these to compute features from."""
    whole, some = random_images(200), random_images(30)
    extract = scoring.extraction([linear()], sharding.make(), 8)
    given = scoring.statistics_of("inception", [extract(whole[i : i + 8])["inception"] for i in range(0, 200, 8)])
    adm = Reference({"inception": given._replace(features=None)}, file_of(some), {})
    found = scoring.references_for([linear()], [adm], extract, 8)["inception"]
    np.testing.assert_array_equal(found.pool[1], given.pool[1])
    np.testing.assert_allclose(found.features, some.reshape(30, -1) / 255, rtol=1e-6)

    alone = scoring.references_for([linear()], [Reference({}, file_of(some), {})], extract, 8)["inception"]
    np.testing.assert_allclose(alone.pool[0], (some / 255).reshape(30, -1).mean(axis=0), rtol=1e-6)
    own = linear(reference=lambda: whole)
    found = scoring.references_for([own], [], extract, 8)["inception"]
    np.testing.assert_array_equal(found.pool[1], given.pool[1])


def test_references_of_something_else_are_refused():
    def refused(references, message, one=None):
        with pytest.raises(ConfigError, match=message):
            scoring.check_reference([one or linear()], references, (4, 4, 1))

    pool = np.zeros(16), np.eye(16)
    good = Reference({"inception": Statistics(pool, digest="ab")}, None, {})
    scoring.check_reference([linear()], [good], (4, 4, 1))
    scoring.check_reference([linear()], [good._replace(images=file_of(random_images(3)))], (4, 4, 1))
    refused([], "no reference has statistics of inception: give one with --reference=FILE")
    refused(
        [Reference({"dinov2": Statistics(pool)}, None, {})], "no reference has statistics of inception, but of dinov2"
    )
    with_own = linear(name="digits", reference=lambda: random_images(3))
    scoring.check_reference([with_own], [], (4, 4, 1))
    refused([good], "no reference has statistics of digits, but of inception", with_own)
    refused([good, good], "two references have statistics of inception")
    other = Reference({"inception": Statistics(pool, digest="cd")}, None, {})
    refused([other], "made with other weights of inception: cd, given ab")
    wide = Reference({"inception": Statistics((np.zeros(768), np.eye(768)))}, None, {})
    refused([wide], "the reference has 768 pool features, inception has 16")
    narrow = Reference({"inception": Statistics(pool, (np.zeros(3), np.eye(3)))}, None, {})
    refused([narrow], "the reference has 3 spatial features, inception has 4")
    large = good._replace(images=file_of(random_images(3, side=8)))
    refused([large], "samples have 4 x 4 pixels and 1 channels, the reference's images 8 x 8 pixels and 1 channels")
    of_images, said = (
        [Reference({}, file_of(random_images(3)), {})],
        "samples have 2 x 4 x 4 pixels and 1 channels, the",
    )
    with pytest.raises(ConfigError, match=said):
        scoring.check_reference([linear()], of_images, (2, 4, 4, 1))
    many = image_files.SampleFiles(Path("set"), 1_281_167, (4, 4, 1), None, None)
    refused([Reference({}, many, {})], "has 1281167 images, more than 100000: make statistics of them once")
    refused([good._replace(about={"made": {"size": [8, 8]}})], "samples have 4 x 4 pixels, the reference is of 8 x 8")


def test_too_few_images_are_refused():
    shapes = scoring.features_of([linear()], (4, 4, 1))
    scoring.check_count(17, shapes, few=False)
    scoring.check_count(2, shapes, few=True)
    with pytest.raises(ConfigError, match=r"16 samples are too few for the covariance of the 16 features of inception"):
        scoring.check_count(16, shapes, few=False)
    with pytest.raises(ConfigError, match=r"1 samples are too few .*at least 2$"):
        scoring.check_count(1, shapes, few=True)
    with pytest.raises(DataError, match=r"toy: statistics need at least two images"):
        scoring.statistics_of("toy", [])


def test_features_that_are_not_finite_are_an_error():
    broken = linear()._replace(init=lambda: {"scale": np.float32(np.nan)})
    extract = scoring.extraction([broken], sharding.make(), 8)
    with pytest.raises(NonFiniteError, match=r"the features of inception are not finite"):
        extract(random_images(3))


def test_no_feature_depends_on_the_batch_or_the_devices(network, images):
    """Not even its last bits: a device always takes as many images at a time."""
    alone = sharding.make(devices=jax.devices()[:1])
    found = []
    for layout, batch in ((alone, network.chunk), (alone, 48), (sharding.make(), 16), (sharding.make(), 48)):
        extract = scoring.extraction([network], layout, batch)
        parts = [extract(images[first : first + batch][: 48 - first])["digits"] for first in range(0, 48, batch)]
        found.append(jax.tree.map(lambda *x: np.concatenate(x), *parts))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


def test_one_program_serves_batches_of_every_size():
    traced = []

    def apply(weights, images):
        traced.append(len(images))
        return linear().apply(weights, images)

    extract = scoring.extraction([linear()._replace(apply=apply, chunk=2)], sharding.make(), 13)
    for count in (13, 1, 16):
        extract(random_images(count))
    assert len(traced) == 1
    for count in (0, 17):  # of 17, filled up to 16, one would be lost
        with pytest.raises(ValueError, match=f"wanted 1 to 16 images at a time, given {count}"):
            extract(random_images(count))


def test_scores_are_those_of_the_metrics_by_hand(monkeypatch):
    for name, value in (("SPLIT", 20), ("SUBSETS", 5), ("SUBSET_SIZE", 30)):
        monkeypatch.setattr(scoring, name, value)
    rng = np.random.default_rng(0)
    ours, theirs = (Features(*(rng.normal(size=(45, d)).astype(np.float32) for d in (6, 4, 5))) for _ in range(2))
    theirs = theirs._replace(pool=theirs.pool * np.float32(1.2))
    parts = [jax.tree.map(lambda x, rows=rows: x[rows], ours) for rows in np.split(np.arange(45), [7, 30])]
    found = scoring.scores("inception", iter(parts), scoring.statistics_of("inception", [theirs]))
    wanted = {
        "fid": frechet_distance(*moments(ours.pool).gaussian, *moments(theirs.pool).gaussian),
        "sfid": frechet_distance(*moments(ours.spatial).gaussian, *moments(theirs.spatial).gaussian),
    }
    both = theirs.pool, ours.pool
    wanted["inception_score"], wanted["inception_score_std"] = inception_score(probabilities(ours.logits), 20)
    wanted["precision"], wanted["recall"] = precision_recall(*both)
    wanted["precision_float16"], wanted["recall_float16"] = precision_recall(*both, distances="float16")
    wanted["kid"], wanted["kid_std"] = kernel_distance(*both, subsets=5, subset_size=30)
    assert found == pytest.approx(wanted, rel=1e-10, abs=1e-10)
    assert wanted["precision"] != wanted["recall"], "this could not tell one from the other"
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("order", [1, -1])
def test_features_are_of_the_images_beside_the_statistics(order):
    """Whatever order two references are given in; and no image is looked at where nothing is missing."""
    one, other = linear(), linear("other")
    some, others = random_images(9), random_images(12, seed=1)
    pool = np.zeros(16), np.eye(16)
    theirs = Statistics(pool, features=np.zeros((5, 16)))
    references = [
        Reference({"inception": Statistics(pool)}, file_of(some), {"name": "a.npz"}),
        Reference({"other": theirs}, file_of(others), {"name": "b.npz"}),
    ][::order]
    scoring.check_reference([one, other], references, (4, 4, 1))
    extract = scoring.extraction([one, other], sharding.make(), 8)
    found = scoring.references_for([one, other], references, extract, 8)
    np.testing.assert_allclose(found["inception"].features, some.reshape(9, -1) / 255, rtol=1e-6)
    assert found["other"] is theirs

    def never(images):
        raise AssertionError("an image was looked at")

    assert scoring.references_for([other], references, never, 8) == {"other": theirs}


def test_two_sets_of_images_and_another_resizing_are_refused():
    alone = [Reference({}, file_of(random_images(3)), {"name": name}) for name in ("a.npz", "b.npz")]
    with pytest.raises(ConfigError, match=r"a.npz and b.npz have images, and none has statistics of inception"):
        scoring.check_reference([linear()], alone, (4, 4, 1))
    one = linear()
    one = one._replace(about=one.about | {"resize": "to 224"})
    for resize, fits in (("to 224", True), (None, True), ("to 448", False)):
        about = {"made": {"extractors": {"inception": {"weights": {}, "resize": resize}}}}
        given = Reference({"inception": Statistics((np.zeros(16), np.eye(16)))}, None, about)
        if fits:
            scoring.check_reference([one], [given], (4, 4, 1))
        else:
            with pytest.raises(ConfigError, match="images resized for inception to 448, given to 224"):
                scoring.check_reference([one], [given], (4, 4, 1))


def test_a_network_that_says_nothing_of_its_weights_is_taken():
    given = Reference({"inception": Statistics((np.zeros(16), np.eye(16)), digest="ab")}, None, {})
    scoring.check_reference([linear()._replace(about={})], [given], (4, 4, 1))


def test_from_files_to_scores_it_is_the_evaluator_of_adm(tmp_path, monkeypatch):
    """Images are numbers here, and the network is a table of the features that ADM's evaluator was given."""
    monkeypatch.setattr(scoring, "SUBSETS", 1)
    m, n = len(ADM["ref"]), len(ADM["samples"])
    table = np.concatenate([ADM["ref"], ADM["samples"]]).astype(np.float32)

    def apply(weights, images):
        return Features(weights[images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]])

    one = Extractor("inception", lambda: table, apply, {"weights": {}})
    numbers = np.arange(m + n)
    images = np.stack([numbers // 256, numbers % 256, 0 * numbers], axis=-1).astype(np.uint8)[:, None, None]
    mu, sigma = moments(ADM["ref"]).gaussian
    np.savez(tmp_path / "VIRTUAL.npz", images[:m], mu=mu, sigma=sigma)
    np.savez(tmp_path / "samples.npz", images[m:])
    reference = open_reference(tmp_path / "VIRTUAL.npz")
    samples = image_files.open_samples(tmp_path / "samples.npz")
    scoring.check_reference([one], [reference], samples.shape)
    extract = scoring.extraction([one], sharding.make(), 100)
    statistics = scoring.references_for([one], [reference], extract, 100)["inception"]
    parts = (extract(samples.read(first, 100))["inception"] for first in range(0, samples.count, 100))
    found = scoring.scores("inception", parts, statistics)
    assert found["fid"] == pytest.approx(float(ADM["fid"]), rel=1e-6)
    assert found["precision_float16"] == pytest.approx(float(ADM["precision"][0]), abs=1e-12)
    assert found["recall_float16"] == pytest.approx(float(ADM["recall"][0]), abs=1e-12)

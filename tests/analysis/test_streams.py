"""The analysis of a network with two streams: text without its padding, and each block of one stream with the other."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import analyze, train
from diversedit_jax.analysis import features, heatmaps, measure
from diversedit_jax.analysis.measure import Estimator, Settings
from diversedit_jax.analysis.study import Study, look
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.metrics import similarity
from diversedit_jax.runs import build, trained
from tests import captioned, untrained

DEPTH, BATCH, T = 4, 16, 0.3
SETTINGS = Settings(num=2 * BATCH, batch=BATCH)


@pytest.fixture(scope="module")
def network():
    """(experiment, what it has learned, frozen weights, batches) of a tiny MMDiT whose weights are random."""
    data = captioned.make_data("test")
    experiment = build.build(captioned.config(), data.space)
    shapes = jax.eval_shape(experiment.components.model.init, jax.random.key(0))
    frozen = build.frozen_weights(experiment.components.codec, experiment.layout)
    shown = measure.batches(data, SETTINGS, experiment.layout)
    return experiment, {"params": untrained.randomly(shapes, 0, scale=0.3)}, frozen, shown


@pytest.fixture(scope="module")
def found(network):
    experiment, *given = network
    return measure.measure(measure.compiled(experiment, SETTINGS), *given, T)


@pytest.fixture(scope="module")
def seen(network):
    """The streams of all batches, with the noise that `measure` gives them."""
    experiment, learned, frozen, shown = network
    parts = []
    run = jax.jit(lambda *given: tuple(features.streams(experiment, *given)))
    for number, batch in enumerate(shown):
        _, key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), number))
        parts.append(jax.device_get(run(learned, frozen, batch, jnp.float32(T), key, False)))
    image, text, mask = zip(*parts, strict=True)
    return np.concatenate(image, axis=1), np.concatenate(text, axis=1), np.concatenate(mask)


def test_texts_are_compared_without_their_padding(network, found, seen):
    image, text, mask = seen
    ids = np.concatenate([batch["y"] for batch in network[-1]])
    np.testing.assert_array_equal(mask.sum(axis=1), 1 + np.argmax(ids == captioned.END, axis=1))
    assert len(set(mask.sum(axis=1).tolist())) > 3, "the captions have different lengths"
    assert image.shape[0] == DEPTH
    assert text.shape[0] == DEPTH - 1, "the last block gives no text"
    pooled = np.stack([[row[keep].mean(axis=0) for row, keep in zip(block, mask, strict=True)] for block in text])
    np.testing.assert_allclose(found.rows["text"], pooled, rtol=1e-4, atol=1e-5)
    rows = [jnp.asarray(block) for block in (*image.mean(axis=2), *pooled)]
    wanted = similarity.cka(rows, hsic=similarity.hsic_unbiased)
    np.testing.assert_allclose(found.both, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.both[:DEPTH, :DEPTH], found.similarity, atol=1e-5)
    padded = similarity.cka([jnp.asarray(block) for block in text.mean(axis=2)], hsic=similarity.hsic_unbiased)
    assert np.abs(padded - wanted[DEPTH:, DEPTH:]).max() > 0.01, "the example does not tell texts from their padding"


def test_minibatches_of_texts_are_compared_by_all_rows(found):
    estimator = Estimator("image", "linear", "minibatch")
    np.testing.assert_allclose(measure.of_both(estimator, found.rows), found.both, atol=1e-6)
    assert measure.of_both(estimator, {"pooled": found.rows["pooled"]}) is None


def test_the_report_shows_both_streams(found, tmp_path):
    one = look("run", 5, T, found, {})
    assert one.text_diversity.keys() == {"all", "adjacent", "distant"}
    assert one.text_diversity["adjacent"] == pytest.approx(1 - np.diagonal(one.text, 1).mean(), rel=1e-5)
    studies = [Study("run", [one], [], {}, []), Study("plain", [one._replace(label="plain", text=None)], [], {}, [])]
    figure = heatmaps.streams(tmp_path, studies)
    assert figure.name == "streams"
    with open(tmp_path / "streams.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    counts = {kind: sum(line["of"] == kind for line in lines) for kind in heatmaps.STREAMS}
    assert counts == {"image": 16, "text": 9, "image and text": 12}
    (line,) = [line for line in lines if (line["of"], line["block"], line["other"]) == ("image and text", "4", "1")]
    assert float(line["similarity"]) == pytest.approx(found.both[3, DEPTH], rel=1e-6)
    assert heatmaps.streams(tmp_path, studies[1:]) is None


def test_a_network_takes_only_conditions_of_its_kind():
    data = captioned.make_data("test", size=8)
    assert trained.fitting(data, "ours", data.space) is data
    features = {"context": np.zeros((16, 36), np.float32)}
    for null in (np.zeros(77, np.int32), features, {"context": np.zeros((77, 36), np.float32)}):
        other = Dataset([], None, Space(captioned.SHAPE, Conditions(null)))
        with pytest.raises(ConfigError, match=r"data 'other': its conditions have shape .*, the network takes \(16,\)"):
            trained.fitting(other, "other", data.space)
    stored = Space(captioned.SHAPE, Conditions(features))
    assert trained.fitting(data._replace(space=stored), "stored", build.from_json(build.to_json(stored)))


@pytest.mark.slow
def test_a_run_on_captions_is_analysed(tmp_path):
    """All parts of an analysis work, and the evaluator logs what the analysis finds."""
    config = captioned.config(model__skip="release")
    config.losses.diversity = slot("losses", "diversity", stream="text", rule="adjacent")
    config.evaluators.similarity = slot("evaluators", "similarity", num=2 * BATCH, batch=BATCH)
    config.evaluators.similarity.every = 2
    train.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["diversity/weight"]) for line in lines if "loss/total" in line)
    opened = trained.of_run(tmp_path / "run", losses=True, trust=True)
    (study,) = analyze.run([opened], tmp_path / "out", SETTINGS, times=(0.05, 0.5))
    logged = {name: value for line in lines for name, value in line.items() if line["step"] == 4}
    for name, value in study.looks[-1].text_diversity.items():
        assert logged[f"similarity/text_diversity_{name}"] == pytest.approx(value, rel=1e-4)
    assert logged["similarity/image_text_similarity"] == pytest.approx(study.looks[-1].between.mean(), rel=1e-4)
    assert study.notes == ["probes are left out: the conditions of these data are not labels"]
    assert study.pulls["diversity"].ratio[0] > 0
    assert study.pulls["diversity"].ratio[-1] == 0, "the last block gives no text"
    assert study.connections.pairs == ((2, 3), (1, 4))
    assert study.maps.maps.shape[0] == DEPTH
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert record["diversity"][-1]["text"] == pytest.approx(study.looks[-1].text_diversity)
    assert analyze.summary([study])[0][4:6] == ["text: mean CKA", "neighbours"]
    assert 'id="streams"' in (tmp_path / "out" / "report.html").read_text()


def test_the_loss_of_the_text_stream_needs_a_text_stream(tmp_path):
    """A run that cannot have the loss ends with one line, before it compiles."""
    config = digits.get_config()
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.losses.diversity.stream = "text"
    with pytest.raises(ConfigError, match="stream = 'text' needs a network with a text stream, such as mmdit"):
        train.run(config, tmp_path / "run")

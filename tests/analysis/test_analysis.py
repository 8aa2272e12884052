"""Looking into networks: features are the network's, sums over batches those of the whole, and files are whole."""

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diversedit_jax import analyze, evaluators, models
from diversedit_jax import config as configs
from diversedit_jax.analysis import (
    features,
    gradient_conflict,
    heatmaps,
    html_page,
    known_scores,
    measure,
    paper_figures,
    pca_maps,
    skip_connections,
)
from diversedit_jax.analysis.gradient_conflict import Pull
from diversedit_jax.analysis.measure import Estimator, Settings
from diversedit_jax.analysis.pca_maps import Maps
from diversedit_jax.analysis.skip_connections import Connections
from diversedit_jax.analysis.study import PARTS, Look, Study, faults
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.data.digits import SHAPE
from diversedit_jax.errors import CheckpointError, ConfigError, NonFiniteError
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.metrics import similarity
from diversedit_jax.metrics.linear_probe import linear_probe
from diversedit_jax.runs import build, trained
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests import ROOT, browser, parts, untrained

DEPTH, WIDTH, BATCH, T = 4, 16, 16, 0.3
SETTINGS = Settings(num=2 * BATCH, batch=BATCH)
FROZEN = {}  # the codec of pixels has no weights


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with two checkpoints that was never trained: all of its weights are random."""
    config = digits.get_config()
    config.model.update({"depth": DEPTH, "width": WIDTH, "heads": 2, "remat": "none"})
    config.losses.same = slot("losses", "tests.parts:make_twice")
    config.losses.against = slot("losses", "tests.parts:make_twice", sign=-1.0)
    config.evaluators = ConfigDict()
    workdir = tmp_path_factory.mktemp("mine")
    untrained.leave(workdir, config, dict.fromkeys((5, 10), ("ema", "params")), scale=0.3)
    lines = [{"step": step, "time": 0, "digits/frechet": 30.0 / step, "digits/accuracy": 0.1} for step in (5, 10)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


@pytest.fixture(scope="module")
def opened(workdir):
    return trained.of_run(workdir, losses=True, trust=True)


@pytest.fixture(scope="module")
def experiment(opened):
    return opened.experiment


@pytest.fixture(scope="module")
def learned(opened):
    return features.learned(opened, 10)


@pytest.fixture(scope="module")
def shown(opened):
    return measure.batches(opened.data("test"), SETTINGS, opened.experiment.layout)


@pytest.fixture(scope="module")
def ready(experiment):
    return measure.compiled(experiment, SETTINGS)


@pytest.fixture(scope="module")
def found(ready, learned, shown):
    return measure.measure(ready, learned, FROZEN, shown, T)


def stacked(experiment, learned, shown):
    """The features of all images at once, with the noise that `measure` gives them; [l n t d]."""
    run = jax.jit(partial(features.features, experiment))
    parts = []
    for number, batch in enumerate(shown):
        _, key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), number))
        parts.append(np.asarray(run(learned, FROZEN, batch, jnp.float32(T), key, False)))
    return np.concatenate(parts, axis=1)


# --- What is measured.


def test_features_are_those_of_the_network(experiment, learned, shown):
    """At t = 0 nothing is added to the image, so the network can be asked directly."""
    batch = shown[0]
    seen = features.features(experiment, learned, FROZEN, batch, jnp.float32(0), jax.random.key(0), False)
    _, wanted = experiment.components.model.network(learned["params"])(batch["x"], jnp.zeros(BATCH), batch["y"])
    assert seen.shape == (DEPTH, BATCH, 16, WIDTH)
    np.testing.assert_allclose(seen, jnp.stack(wanted[1:]), atol=1e-5)


def test_before_the_merge_only_the_deep_half_differs(workdir, experiment, learned, shown):
    before = trained.of_run(workdir, model={"capture": "block"}).experiment
    seen = [
        np.asarray(features.features(one, learned, FROZEN, shown[0], jnp.float32(T), jax.random.key(0), False))
        for one in (experiment, before)
    ]
    np.testing.assert_array_equal(seen[0][:2], seen[1][:2])
    assert (np.abs(seen[0][2:] - seen[1][2:]).max(axis=(1, 2, 3)) > 0.1).all()


def test_weights_are_those_asked_for(opened, learned):
    online = features.learned(opened, 10, "online")
    kernels = [one["params"]["final"]["kernel"] for one in (online, learned)]
    assert not np.allclose(*kernels)


def test_batch_after_batch_is_as_good_as_all_at_once(experiment, learned, shown, found):
    whole = stacked(experiment, learned, shown)
    pooled = jnp.asarray(whole.mean(axis=2))
    np.testing.assert_allclose(
        found.similarity, similarity.cka(pooled, hsic=similarity.hsic_unbiased), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(found.rows["pooled"], pooled, atol=1e-5)
    tokens = whole.reshape(DEPTH, -1, WIDTH)
    wanted = np.stack([np.cov(block.T, bias=True) for block in tokens])
    np.testing.assert_allclose(found.covariance, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.norm, np.linalg.norm(tokens, axis=-1).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.token_cosine, similarity.token_cosine(jnp.asarray(whole)), atol=1e-4)
    np.testing.assert_allclose(found.mean_cosine, similarity.mean_cosine(jnp.asarray(whole)), atol=1e-4)
    np.testing.assert_allclose(found.mean_share, similarity.mean_share(jnp.asarray(whole)), rtol=1e-3)
    batches = jnp.split(jnp.asarray(whole), len(shown), axis=1)
    centred = np.mean([similarity.centred_cosine(batch) for batch in batches], axis=0)
    np.testing.assert_allclose(found.centred_cosine, centred, atol=1e-4)


def test_minibatches_are_those_of_the_batches(experiment, learned, shown, found):
    whole = stacked(experiment, learned, shown).reshape(DEPTH, 2, BATCH, -1)
    sums = sum(similarity.hsic_of(jnp.asarray(whole[:, i]), hsic=similarity.hsic_unbiased) for i in range(2))
    np.testing.assert_allclose(found.minibatch["image", "linear"], similarity.normalised(sums), rtol=1e-3, atol=1e-4)


def test_whole_images_are_gathered_as_far_as_they_fit(experiment, learned, shown, monkeypatch):
    settings = SETTINGS._replace(estimator=Estimator("image", "rbf", "biased"))
    ready = measure.compiled(experiment, settings)
    whole = stacked(experiment, learned, shown).reshape(DEPTH, 2 * BATCH, -1)
    found = measure.measure(ready, learned, FROZEN, shown, T).similarity
    np.testing.assert_allclose(found, similarity.cka(jnp.asarray(whole), similarity.rbf), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(measure, "IMAGE_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"--unit=image: the features of 16 whole images .* give --hsic=minibatch"):
        measure.measure(ready, learned, FROZEN, shown, T)


def test_other_noise_is_another_draw(learned, shown, ready, found):
    twice = ready._replace(settings=SETTINGS._replace(noises=2))
    both = measure.measure(twice, learned, FROZEN, shown, T)
    assert both.spread > 0
    assert found.spread == 0
    assert np.abs(both.similarity - found.similarity).max() > 1e-4
    np.testing.assert_array_equal(both.rows["pooled"], found.rows["pooled"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            SETTINGS._replace(estimator=Estimator(kernel="liner")),
            r"--kernel = 'liner' is unknown; did you mean 'linear'",
        ),
        (
            SETTINGS._replace(estimator=Estimator(unit="pixel")),
            r"--unit = 'pixel' is unknown; .*known: pooled, token, image",
        ),
        (SETTINGS._replace(estimator=Estimator(multiplier=0.0)), r"--multiplier = 0.0: must be more than 0"),
        (SETTINGS._replace(num=0), "--num = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        measure.check(settings)


def test_too_few_images_are_refused(opened):
    with pytest.raises(ConfigError, match=r"--num=512 of 360 examples: not one batch of 400 \(--batch\)"):
        measure.batches(opened.data("test"), Settings(batch=400), opened.experiment.layout)


# --- Probes.


def test_a_linear_probe_reads_what_is_linear():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=300)
    rows = rng.standard_normal((300, 5)) * np.array([1, 100, 1, 1, 0]) + 3
    rows[:, 0] += 4 * (labels == 1)
    rows[:, 2] += 4 * (labels == 2)
    fit = [jnp.asarray(x) for x in (rows[:200], labels[:200], rows[200:], labels[200:])]
    assert linear_probe(*fit, 3) > 0.9
    assert linear_probe(fit[0], jnp.asarray(rng.permutation(labels[:200])), *fit[2:], 3) < 0.6


def test_the_network_cannot_tell_the_probe_the_label(ready, learned, shown):
    """At t = 1 the image is noise: only the label that the network is given could be read."""
    labels = learned["params"]["label_embed"]["embedding"]
    told = learned | {"params": learned["params"] | {"label_embed": {"embedding": labels.at[:10].multiply(100)}}}
    assert (measure.probe_accuracies(ready, told, FROZEN, shown, shown, 1.0) < 1).all()
    rows, y = (
        measure.measure(ready, told, FROZEN, shown, 1.0).rows["pooled"],
        np.asarray(jnp.concatenate([b["y"] for b in shown])),
    )
    assert linear_probe(*map(jnp.asarray, (rows[-1], y, rows[-1], y)), 10) == 1, "given real labels, it could"


# --- Gradients, connections, maps.


@pytest.mark.slow
def test_a_loss_that_is_the_objective_pulls_where_it_pulls(experiment, learned, shown):
    found = gradient_conflict.pulls(experiment, experiment.components.losses, learned, FROZEN, shown, step=10)
    assert found.keys() == {"diversity", "same", "against"}
    for label, cosine in (("same", 1), ("against", -1)):
        np.testing.assert_allclose(found[label].cosine, cosine, rtol=1e-4)
        np.testing.assert_allclose(found[label].ratio, 2, rtol=1e-4)
        np.testing.assert_allclose(found[label].spread, 0, atol=1e-4)
    assert (np.abs(found["diversity"].cosine) < 0.99).all()
    assert (found["diversity"].ratio > 0).all(), "at full weight, whatever the adaptive weight"


@pytest.mark.slow
def test_a_loss_pulls_as_it_weighs_at_the_step_of_the_checkpoint(experiment, learned, shown):
    losses = {"now": parts.make_since(at=10), "later": parts.make_since(at=11)}
    found = gradient_conflict.pulls(experiment, losses, learned, FROZEN, shown[:1], step=10)
    np.testing.assert_allclose(found["now"].cosine, 1, rtol=1e-4)
    assert np.isnan(found["later"].cosine).all()
    np.testing.assert_array_equal(found["later"].ratio, 0)


def test_a_connection_is_cut_where_its_linear_reads_it(opened, experiment, learned, shown):
    found, params = skip_connections.used(experiment, learned, FROZEN, shown), learned["params"]
    assert found.pairs == ((2, 3), (1, 4))
    kernel = np.asarray(params["merges"]["linear"]["kernel"] * params["merges"]["norm"]["scale"][..., None])
    np.testing.assert_allclose(found.current, np.linalg.norm(kernel[:, :WIDTH].reshape(2, -1), axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.skip, np.linalg.norm(kernel[:, WIDTH:].reshape(2, -1), axis=1), rtol=1e-5)
    assert (np.abs(found.cut / found.loss - 1) > 1e-3).all()
    merges = params["merges"]
    deaf = merges | {"linear": merges["linear"] | {"kernel": merges["linear"]["kernel"].at[0, WIDTH:].set(0)}}
    again = skip_connections.used(experiment, learned | {"params": params | {"merges": deaf}}, FROZEN, shown)
    assert again.loss == pytest.approx(found.cut[0], rel=1e-5)
    assert again.cut[0] == pytest.approx(again.loss, rel=1e-6), "it did not listen to the skip before"
    assert again.cut[1] == pytest.approx(found.all_cut, rel=1e-5)
    plain = trained.of_run(opened.workdir, model={"skip": "none"}).experiment
    assert skip_connections.used(plain, learned, FROZEN, shown) is None


def test_maps_are_pictures_of_the_images_they_stand_beside(experiment, learned, shown):
    found = pca_maps.principal(experiment, learned, FROZEN, shown[0], 0.0, count=3)
    assert (found.maps.shape, found.maps.dtype) == ((DEPTH, 3, 4, 4, 3), np.uint8)
    wanted = experiment.components.codec.decode(FROZEN, shown[0]["x"])[:3]
    np.testing.assert_array_equal(found.images, wanted)
    assert ((found.explained > 3 / WIDTH) & (found.explained <= 1)).all()
    assert found.maps.std(axis=(1, 2, 3)).min() > 5, "no block's map is of one colour"


# --- Scores.


def test_the_scores_of_a_sweep_come_last_and_say_their_setting(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"sampler": {"cfg_scale": 1.0, "steps": 50}}))
    for folder, cfg_scale, fd in (("7/cfg_scale=1", 1.0, 0.07), ("7/cfg_scale=4", 4.0, 0.4), ("7", 2.0, 0.2)):
        place = tmp_path / "evaluations" / folder
        place.mkdir(parents=True, exist_ok=True)
        sampler = {"cfg_scale": cfg_scale, "steps": 50, "eta": 0.0}
        plan = {"images": {"kind": "run", "step": 7, "sampler": sampler}}
        (place / "scores.json").write_text(json.dumps({"plan": plan, "scores": {"fd_digits": fd}}))
    found = known_scores.found(tmp_path)[7]
    own, *others = found
    assert (own, found[own]) == ("cfg_scale=1/fd_digits", 0.07)
    assert set(others) == {"cfg_scale=4/fd_digits", "evaluate cfg_scale=2/fd_digits"}
    assert known_scores.column([found], ["fd"]) == own
    titles = {known_scores.title(name) for name in others}
    assert titles == {"FD (digits), cfg_scale=4", "FD (digits), cfg_scale=2"}


def test_scores_are_found_by_step(workdir, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "time": 1, "loss/total": 1.0}\n{"step": 5, "scores/fid": 30.5, "scores/inception_score": 9.0}\n{"'
    )
    for folder, fid in (("10_repa", 8.0), ("10_repa/cfg_scale=2", 7.0), ("10", 9.0)):
        place = tmp_path / "evaluations" / folder
        place.mkdir(parents=True)
        plan = {"images": {"kind": "run", "step": 10}}
        (place / "scores.json").write_text(json.dumps({"plan": plan, "scores": {"fid": fid, "precision": 0.7}}))
    (tmp_path / "evaluations" / "10" / "torn").mkdir()
    (tmp_path / "evaluations" / "10" / "torn" / "scores.json").write_text('{"plan"')
    found = known_scores.found(tmp_path)
    assert found[5] == {"scores/fid": 30.5, "scores/inception_score": 9.0}
    assert found[10]["repa/fid"] == 8.0
    assert found[10]["repa/cfg_scale=2/fid"] == 7.0
    assert found[10]["evaluate/fid"] == 9.0
    assert next(iter(found[10])) == "evaluate/fid"
    assert known_scores.found(None) == {}
    assert known_scores.column([found[5], {"scores/fid": 3.0}, found[10]], ["fid"]) == "scores/fid"
    assert known_scores.column([found[5]], ["recall"]) is None
    assert [known_scores.title(n) for n in ("a/fid", "b/fd_dinov2", "inception_score", "x/inception_score_digits")] == [
        "FID",
        "FD (dinov2)",
        "IS",
        "IS (digits)",
    ]
    assert not known_scores.is_distance("digits/frechet_floor")
    assert not known_scores.is_distance("solids/real/frechet"), "it is of real data"
    assert known_scores.column([{"a/real/accuracy": 1.0, "a/accuracy": 0.5}], ["accuracy"]) == "a/accuracy"


# --- The report.


@pytest.mark.slow  # test_outside and test_network analyse a run by default
def test_a_run_is_analysed_and_everything_lies_in_one_folder(opened, tmp_path, capsys):
    (study,) = analyze.run([opened._replace(label="one")], tmp_path, SETTINGS, t=T, times=(T, 0.8))
    out, err = capsys.readouterr()
    assert "one, step 10: mean CKA of two blocks" in err
    assert f"  report   {tmp_path / 'report.html'}" in out
    assert "Fréchet distance" in out
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {
        *("blocks", "training", "diversity", "timesteps", "ranks", "channels", "probe"),
        *("gradients", "connections", "maps", "cosines", "estimators"),
    }
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] > 400
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()[:3000]
        with open(tmp_path / f"{name}.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) >= DEPTH or name in ("diversity", "connections")
        assert all(None not in line.values() for line in lines)
    with open(tmp_path / "training.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    cell = next(line for line in lines if (line["step"], line["block"], line["other"]) == ("10", "1", "3"))
    assert float(cell["similarity"]) == pytest.approx(study.looks[1].similarity[0, 2])
    record = json.loads((tmp_path / "analysis.json").read_text())
    assert record["settings"]["estimator"]["kernel"] == "linear"
    assert record["subjects"][0]["images"] == 2 * BATCH
    text = (tmp_path / "report.html").read_text()
    assert text.count("<section") == len(names)
    assert "http" not in text.replace("http-equiv", "").replace("xmlns", "")


@pytest.mark.slow
def test_a_release_needs_no_training_state(tmp_path):
    """The official SiT's layout, its weights random, on images of digits."""
    dims = {"depth": 2, "width": WIDTH, "heads": 2}
    model = models.make("official_sit", Space(SHAPE, Conditions.labels(10)), {}, **dims)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    arch = releases.Architecture(**dims, patch=2, channels=1, out_channels=2, num_classes=10)
    own = jax.tree.map(np.asarray, untrained.randomly(shapes, 0, scale=0.3))
    file = tmp_path / "sit.safetensors"
    write_safetensors(file, releases.export(own, "official_sit", arch, sides=(8, 8)))
    about = {"family": "official_sit", "heads": 2, "data": slot("data", "digits").to_dict()}
    opened = trained.of_release(file, **about)
    experiment = opened.experiment
    shown = measure.batches(opened.data("train"), SETTINGS, experiment.layout)
    learned = features.learned(opened, 0)
    seen = features.features(experiment, learned, FROZEN, shown[0], jnp.float32(0), jax.random.key(0), False)
    _, wanted = model.network(own)(shown[0]["x"], jnp.zeros(BATCH), shown[0]["y"])
    np.testing.assert_allclose(seen, jnp.stack(wanted[1:]), atol=1e-5)
    settings = SETTINGS._replace(split="train")
    (study,) = analyze.run(
        [opened], tmp_path / "out", settings, at=["last"], parts=("gradients", "connections", "maps")
    )
    assert study.pulls.keys() == {"diversity (not trained)"}
    assert study.connections is None
    assert (tmp_path / "out" / "report.html").exists()
    with pytest.raises(ConfigError, match=r"sit.safetensors comes without data: say what to show it with --data"):
        trained.of_release(file, family="official_sit", heads=2).data("train")
    other = slot("data", "synthetic", shape=(8, 8, 4)).to_dict()
    with pytest.raises(ConfigError, match=r"data 'synthetic': its shape is \(8, 8, 4\), the network takes \(8, 8, 1\)"):
        trained.of_release(file, **about | {"data": other}).data("train")
    more = slot("data", "synthetic", shape=(8, 8, 1), num_classes=1000).to_dict()
    with pytest.raises(ConfigError, match="data 'synthetic': it has 1000 classes, the network knows 10"):
        trained.of_release(file, **about | {"data": more}).data("train")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        (
            {"norm": [1, np.nan, 1, np.inf], "rank": [1, np.nan, 1, 1]},
            ["step 5, t = 0.05: rank not finite: the features of blocks 2, 4 are not finite"],
        ),
        (
            {"similarity": np.diag([1, 1, np.nan, 1])},
            ["step 5, t = 0.05: similarity not finite: the features of blocks 3 are the same for all examples"],
        ),
        ({"token_cosine": [[np.nan]]}, ["step 5, t = 0.05: token_cosine not finite"]),
    ],
)
def test_what_is_not_finite_is_told_with_its_cause(change, told):
    found = study_of("run", depth=4, steps=(5,), known=False)
    look = found.looks[0]._replace(t=0.05)
    found = found._replace(looks=[look._replace(**{name: np.asarray(x) for name, x in change.items()})], times=[])
    assert faults(found) == told
    assert faults(found._replace(probe=np.array([np.nan]))) == [*told, "probe: not finite"]


@pytest.mark.slow
def test_an_analysis_with_numbers_that_are_not_finite_ends_with_an_error(tmp_path, capfd):
    dims = {"depth": 2, "width": 16, "heads": 2}
    arch = releases.Architecture(**dims, patch=2, channels=1, out_channels=1, num_classes=10)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), releases.abstract(arch))
    file = tmp_path / "sit.safetensors"
    write_safetensors(file, releases.export(params, "sit", arch, sides=(8, 8)))
    opened = trained.of_release(file, heads=2, data=slot("data", "digits").to_dict())
    told = r"step 0, t = 0.05: similarity.* not finite: the features of blocks 1, 2 are not finite"
    with pytest.raises(NonFiniteError, match=told):
        analyze.run([opened], tmp_path / "out", SETTINGS._replace(split="train"), at=["last"], parts=())
    assert "the features of blocks 1, 2 are not finite" in (tmp_path / "out" / "report.html").read_text()


def study_of(label, seed=0, depth=5, steps=(5_000, 50_000, 450_000), known=True):
    """What a study might have found."""
    rng = np.random.default_rng(seed)

    def matrix():
        x = rng.uniform(0.2, 1, (depth, depth))
        return np.asarray((x + x.T) / 2 * (1 - np.eye(depth)) + np.eye(depth), np.float32)

    def one(step, t):
        m = matrix()
        diverse = {name: float(x) for name, x in similarity.diversity(jnp.asarray(m)).items()}
        lines = [rng.uniform(1, 9, depth) for _ in range(4)]
        usage = np.sort(rng.dirichlet(np.ones(8), depth))[:, ::-1]
        found = {"evaluate/fid": 1e6 / step, "evaluate/sfid": 5.0, "evaluate/precision": 0.5} if known else {}
        return Look(label, step, t, m, 0.0, m, m, m, diverse, *lines[:2], usage, *lines[2:4], lines[0] / 9, found)

    ones = np.ones(depth // 2, np.float32)
    pairs = tuple((depth // 2 - i, depth - depth // 2 + i + 1) for i in range(depth // 2))
    details = (
        rng.uniform(0, 1, depth),
        {"diversity": Pull(*rng.uniform(-1, 1, (3, depth)))},
        Connections(pairs, ones, 2 * ones, 0.5, 0.6 * ones, 0.9),
        Maps(
            np.zeros((2, 8, 8, 3), np.uint8),
            rng.integers(0, 255, (depth, 2, 4, 4, 3), dtype=np.uint8),
            rng.uniform(0, 1, depth),
        ),
        {"linear, pooled": matrix(), "Procrustes": matrix()},
    )
    about = {"images": 32, "of": 360, "capture": "merged"}
    looks, times = [one(step, 0.04) for step in steps], [one(steps[-1], t) for t in (0.1, 0.9)]
    return Study(label, looks, times, about, [], *details)


SEVERAL = [study_of("SiT, <a> & b", 0), study_of("SiT, <a> & b", 1), study_of("DiverseDiT", 2, depth=28)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, heatmaps.draw_all(folder, SEVERAL, "linear CKA")


def test_several_runs_stand_side_by_side(drawn):
    folder, drawn = drawn
    assert {one.name for one in drawn} == {
        *("blocks", "training", "diversity", "timesteps", "scores", "ranks", "channels", "probe"),
        *("gradients", "connections", "maps", "cosines", "estimators"),
    }
    for one in drawn:
        with Image.open(folder / f"{one.name}.png") as image:
            assert image.size[0] <= 7.2 * 200, f"{one.name} is wider than a page"
        assert one.text.endswith(".")
    with open(folder / "connections.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["from_block"], line["to_block"]) == ("2", "4")
    with open(folder / "blocks.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 5 + 28 * 28
    first = np.mean([study.looks[-1].similarity for study in SEVERAL[:2]], axis=0)
    assert float(lines[1]["similarity"]) == pytest.approx(first[0, 1])
    rows = analyze.summary(SEVERAL)
    assert [row[0] for row in rows] == ["", "SiT, <a> & b", "DiverseDiT"]
    assert "±" in rows[1][2]
    assert "±" not in rows[2][2]
    assert rows[0][-1] == "FID"


def test_the_layouts_of_the_paper(tmp_path):
    for layout in paper_figures.LAYOUTS.values():
        assert layout(tmp_path, SEVERAL, "rbf CKA")
    assert {path.name for path in tmp_path.glob("*.svg")} == {"figure2.svg", "timesteps.svg", "table_a2.svg"}
    text = (tmp_path / "table_a2.md").read_text().splitlines()
    assert text[0] == "| run | step | FID | sFID | IS | precision | recall | mean CKA |"
    assert text[2].startswith("| SiT, <a> & b | 5,000 | 200 | 5 | - | 0.5 | - | ")
    assert r"SiT, <a> \& b & 5,000 & 200" in (tmp_path / "table_a2.tex").read_text()
    with open(tmp_path / "figure2.csv", newline="") as file:
        steps = [line["step"] for line in csv.DictReader(file) if line["label"] == "SiT, <a> & b"]
    assert sorted(set(steps), key=int) == ["5000", "50000", "450000"]


@pytest.mark.skipif(browser.find() is None, reason="no Chromium: apt-get install chromium")
def test_the_report_opens_in_a_browser(drawn):
    folder, drawn = drawn
    report = folder / "report.html"
    html_page.write(report, "A <report>", [analyze.summary(SEVERAL)], drawn, ["one & two"], {"time": "0.05"})
    for width in (1200, 390):
        seen = browser.look(report, width)
        assert not seen.messages
        assert seen.requests == [report.as_uri()]
        assert len(seen.images) == len(drawn)
        assert all(image["complete"] and image["naturalWidth"] > 100 and image["alt"] for image in seen.images)
        assert seen.width <= seen.viewport, "a reader would have to scroll sideways"
        assert "A <report>" in seen.text
        assert "one & two" in seen.text


# --- Flags.


def test_what_is_asked_for(opened, workdir, tmp_path):
    assert analyze.steps_of(opened, ["all"]) == [5, 10]
    assert analyze.steps_of(opened, ["last"]) == [10]
    assert analyze.steps_of(opened, ["5", "7"]) == [5]
    with pytest.raises(ConfigError, match=r"--at=7: mine0 has no such step; it has 5, 10"):
        analyze.steps_of(opened._replace(label="mine0"), ["7"])
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        analyze.steps_of(opened._replace(steps=()), ["all"])
    with pytest.raises(ConfigError, match=r"--at=some: must be numbers"):
        analyze.steps_of(opened, ["some"])
    assert analyze.named("A b=runs/x") == ("A b", Path("runs/x"))
    assert analyze.named(str(workdir)) == (None, workdir)
    assert analyze.parts_of(["maps"]) == [name for name in PARTS if name != "maps"]
    with pytest.raises(ConfigError, match=r"--skip = 'map' is unknown; did you mean 'maps'"):
        analyze.parts_of(["map"])
    found = run_flags.data_of("latents=/some/where,mirror=True")
    assert (found["name"], found["data_dir"], found["mirror"]) == ("latents", "/some/where", True)
    with pytest.raises(ConfigError, match=r"--times = 1.5: must be at least 0 and at most 1"):
        analyze.run([opened], tmp_path, SETTINGS, times=(0.5, 1.5))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file cannot be written: it is a file"):
        analyze.run([opened], tmp_path / "file", SETTINGS)
    other = opened._replace(about=opened.about | {"model": {"depth": 9}})
    with pytest.raises(ConfigError, match=r"names networks of different depth: give each its own, LABEL=PATH"):
        analyze.run([opened, other], tmp_path, SETTINGS)


@pytest.mark.parametrize("preset", analyze.PRESETS)
def test_presets_change_what_is_not_said(preset):
    class Flag:
        def __init__(self, value, present):
            self.value, self.present = value, present

    known = {name: Flag(f"the default {name}", 0) for name in analyze.OPTIONS} | {"kernel": Flag("linear", 1)}
    option = analyze.applied(preset, known)
    assert (option["kernel"], option["hsic"], option["unit"], option["time"]) == ("linear", "biased", "pooled", 0.04)
    assert analyze.applied(None, known)["hsic"] == "the default hsic"
    assert preset in paper_figures.LAYOUTS


def program(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=nowhere"], "error: nowhere does not exist: wanted the directory of a run or a file of weights"),
        pytest.param(
            ["--checkpoint=no.pt"], "error: no.pt does not exist: wanted the directory", marks=pytest.mark.slow
        ),
        pytest.param(
            [], "error: give --workdir=DIR of a run or --checkpoint=FILE of a release", marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, message):
    done = program("diversedit_jax.analyze", *flags)
    assert message in done.stderr
    assert done.returncode == 78
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_program_compares_what_follows_its_flag(workdir, tmp_path):
    flags = ["--workdir=one", "--compare", f"one={workdir}", f"two={workdir}", f"--out={tmp_path}", "--skip=estimators"]
    done = program(
        "diversedit_jax.analyze",
        *[flags[0].replace("one", f"one={workdir}"), *flags[1:], "--num=32", "--trust_workdir"],
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "diversity.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["label"], line["run"], line["step"]) for line in lines] == [
        *[("one", "0", "5"), ("one", "0", "10"), ("one", "1", "5"), ("one", "1", "10")],
        *[("two", "2", "5"), ("two", "2", "10")],
    ]
    values = {line["all"] for line in lines}
    assert len(values) == 2, "the same checkpoints, the same numbers"
    assert not (tmp_path / "estimators.png").exists()


@pytest.mark.slow
def test_the_study_trains_analyses_and_goes_on(tmp_path):
    command = ["tools.studies.blocks", f"--out={tmp_path}", "--steps=4", "--every=2", "--seeds=1", "--num=20"]
    for _ in range(2):
        done = program(*command)
        assert done.returncode == 0, done.stderr
    assert "nothing to do: the checkpoint is at step 4" in done.stderr
    text = (tmp_path / "report.html").read_text()
    assert all(label in text for label in ("SiT", "+ long residuals", "+ diversity loss", "DiverseDiT (both)"))


# --- During training.


def test_the_evaluator_of_a_run_says_the_same(workdir, opened, learned, found):
    built = build.build(configs.load(workdir, trust=True), opened.space)
    before = built.config.to_dict()
    spec, options = SampleSpec.of(built), {"num": 2 * BATCH, "batch": BATCH}
    values = dict(evaluators.make("similarity", spec, time=T, **options)(Current(learned, FROZEN, None)))
    picture = values.pop("heatmap")
    assert (picture.dtype, picture.ndim, picture.shape[-1]) == (np.uint8, 3, 3)
    diverse = similarity.diversity(jnp.asarray(found.similarity))
    rank = similarity.effective_rank(jnp.asarray(found.covariance)).mean()
    wanted = {f"diversity_{name}": float(value) for name, value in diverse.items()} | {"effective_rank": float(rank)}
    wanted |= {"mean_share": float(found.mean_share.mean()), "norm": float(found.norm[-1])}
    wanted["centred_cosine"] = float(similarity.off_diagonal_mean(jnp.asarray(found.centred_cosine)))
    assert values == pytest.approx(wanted, rel=1e-4)
    assert built.config.to_dict() == before, "the run's own config has changed"
    with pytest.raises(ConfigError, match=r"similarity: time = 2.0: must be at least 0 and at most 1"):
        evaluators.make("similarity", spec, time=2.0, **options)

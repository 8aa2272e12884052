"""Evaluation of a network with captions as conditions: which captions, the CLIP score, the same after a kill."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import evaluate, network
from diversedit_jax.config import slot
from diversedit_jax.data import Dataset, latents
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors, presets
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.runs import build, trained
from tests import captioned, untrained, whole_clip

NUM = 37  # of 40 held-out images, and no multiple of the batch
SPACE = captioned.make_data("test", size=1).space


def make(split: str, *, size: int = 40) -> Dataset:
    """`size` pictures [8 8 3] of one colour. Number i has 1 + i mod 4 captions, which say its number and their own."""
    rng = np.random.default_rng([size, split == "test"])

    def example(i: int) -> dict:
        captions = np.stack([captioned.ids(i, 80 + number) for number in range(1 + i % 4)])
        x = np.broadcast_to(np.float32(rng.uniform(-1, 1, 3)), captioned.SHAPE)
        return {"x": x, "y": captions[0]} | ({"captions": captions} if len(captions) > 1 else {})

    return captioned.make_data(split, size=1)._replace(source=[example(i) for i in range(size)], transform=latents.draw)


def conditions(rule, num, seed=0, data=make):
    return build.conditions(data, SPACE, rule, num, seed)


def named(ids):
    """The number of the image, and that of its caption, for each row of ids."""
    return [(int(row[1]), int(row[2]) - 80) for row in ids]


# --- Which captions.


def test_data_are_held_out_images_in_order_with_their_first_caption():
    assert named(conditions("data", 50)) == [(i % 40, 0) for i in range(50)]
    np.testing.assert_array_equal(conditions(None, 5), conditions("data", 5))


def test_shuffled_takes_no_image_twice_and_every_caption_alike():
    found = named(conditions("shuffled", 40))
    assert sorted(image for image, _ in found) == list(range(40))
    assert [image for image, _ in found] != list(range(40))
    assert all(caption <= image % 4 for image, caption in found)
    counts = Counter(
        caption for seed in range(60) for image, caption in named(conditions("shuffled", 40, seed)) if image % 4 == 3
    )
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 150) < 4 * np.sqrt(600 * 3 / 16) for count in counts.values())
    with pytest.raises(ConfigError, match=r"labels = 'shuffled': 41 samples .* there are 40 held-out examples"):
        conditions("shuffled", 41)


def test_a_larger_number_only_appends():
    whole = conditions("shuffled", 40, 3)
    for num in (1, 7, 39):
        np.testing.assert_array_equal(conditions("shuffled", num, 3), whole[:num])
    assert (conditions("shuffled", 40, 4) != whole).any()


def test_examples_are_read_in_parts(monkeypatch):
    whole = conditions("shuffled", 40)
    monkeypatch.setattr(build, "AT_ONCE", 7)
    np.testing.assert_array_equal(conditions("shuffled", 40), whole)


def test_without_held_out_images_those_of_training_are_taken():
    def data(split):
        if split == "test":
            raise ConfigError("no such split")
        return make(split)._replace(transform=None)

    assert sorted(named(conditions("shuffled", 40, data=data))) == [(i, 0) for i in range(40)], (
        "no draw, first captions"
    )


def test_labels_may_be_shuffled_too():
    source = [{"x": np.zeros(3, np.float32), "y": np.int32(i)} for i in range(9)]
    found = conditions("shuffled", 9, data=lambda split: Dataset(source, None, SPACE))
    assert (sorted(found), found.dtype) == (list(range(9)), np.int32)


# --- A run.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return whole_clip.leave(tmp_path_factory.mktemp("clip") / "whole", captioned.encoder())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, clip):
    """A run that was never trained. Its images depend on their captions."""
    config = captioned.config()
    config.data = slot("data", "tests.test_captioned_evaluation:make")
    config.model = slot("models", "tests.outside.network:make")
    config.sampler.update({"cfg_scale": 1.5, "batch_size": 8})
    options = {"extractor": "clip", "file": str(clip), "num": NUM, "labels": "shuffled"}
    config.evaluators = ConfigDict({"clip": slot("evaluators", "scores", **options)})
    workdir = tmp_path_factory.mktemp("run")
    untrained.leave(workdir, config, {8: ("ema",)}, 0.3, SPACE)
    return workdir


@pytest.fixture(scope="module")
def source(workdir):
    return trained.drawing(trained.of_run(workdir, trust=True))


@pytest.fixture(scope="module")
def judges(workdir):
    return evaluate.judges_of([], [], str(workdir), trust=True)


def drawn(source, num=NUM, rule="shuffled", seed=0):
    return evaluate.of_source(source, {}, source.sampler, num, rule, seed)


def scored(judges, images, folder, keep_samples=False):
    ((_, scores),) = evaluate.run(judges, [{}], lambda point: images, folder, keep_samples)
    return scores


@pytest.fixture(scope="module")
def undisturbed(source, judges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, scored(judges, drawn(source), folder, keep_samples=True)


def test_without_a_reference_there_is_the_clip_score_alone(undisturbed, source, clip):
    folder, scores = undisturbed
    with np.load(folder / "samples.npz") as file:
        images = file["arr_0"]
    one = extractors.make("clip", file=str(clip))
    y = source.conditions("shuffled", NUM, 0)
    match = np.asarray(jax.jit(lambda w, x, y: one.match(w, one.apply(w, x), y))(one.init(), images, y))
    assert scores == {"clip_score": pytest.approx(np.mean(match, dtype=np.float64), rel=1e-5)}
    assert 0 < scores["clip_score"] < 100
    assert np.std(match) > 1, "captions and images are told apart"
    assert {path.name for path in folder.iterdir()} == {"scores.json", "grid.png", "samples.npz"}
    record = json.loads((folder / "scores.json").read_text())
    assert record["plan"]["images"]["labels"] == "shuffled"
    assert len(record["plan"]["images"]["conditions"]) == 16
    assert record["plan"]["extractors"]["clip"]["weights"]["name"] == "whole"
    assert len(record["plan"]["images"]["text_encoder"]["sha256"]) == 64
    assert record["preset"] is None


def test_an_interrupted_evaluation_ends_in_the_same_score(undisturbed, source, judges, tmp_path, capsys):
    images, seen = drawn(source), []

    def stopping(first, count):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(first)
        return images.read(first, count)

    with pytest.raises(KeyboardInterrupt):
        scored(judges, images._replace(read=stopping), tmp_path)
    with pytest.raises(ConfigError, match=r"unfinished evaluation .*images.conditions: "):
        scored(judges, drawn(source, seed=1), tmp_path)
    assert scored(judges, drawn(source), tmp_path) == undisturbed[1]
    assert "going on: 2 of 5 parts are there" in capsys.readouterr().err


def test_a_grid_shows_captions(source, judges, tmp_path, monkeypatch):
    shown = []

    def picture(samples, names, *options):
        shown.extend(names)
        return drawing(samples, names, *options)

    drawing = evaluate.pictures.picture
    monkeypatch.setattr(evaluate.pictures, "picture", picture)
    scored(judges, drawn(source, 11), tmp_path)
    assert shown == source.named(source.conditions("shuffled", 10, 0))
    assert len(set(shown)) == 10
    assert all(map(str.strip, shown))


def test_with_a_reference_distances_come_beside_it(undisturbed, source, judges, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    opened = judges._replace(references=[evaluate.open_reference(tmp_path / "real.npz")])
    found = scored(opened, drawn(source), tmp_path / "drawn")
    assert {"fd_clip", "kd_clip", "precision_clip", "recall_clip", "clip_score"} < found.keys()
    assert found["clip_score"] == undisturbed[1]["clip_score"]
    kept = evaluate.of_file(undisturbed[0] / "samples.npz", None)
    of_file = scored(opened, kept, tmp_path / "file")
    assert "clip_score" not in of_file, "nobody knows the captions of a file"
    assert of_file["fd_clip"] == pytest.approx(found["fd_clip"], rel=1e-4)
    with pytest.raises(ConfigError, match="no reference has statistics of clip: give one"):
        scored(judges, kept, tmp_path / "none")


def test_conditions_that_are_no_captions_are_refused_before_sampling(source, judges, tmp_path):
    images = drawn(source)
    for y, said in ((np.arange(NUM), "labels"), ({"context": np.zeros((NUM, 3, 2), np.float32)}, "stored features")):
        with pytest.raises(ConfigError, match=f"clip: the conditions are {said}; its score compares"):
            scored(judges, images._replace(conditions=y), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_plots_the_clip_score(source, judges, tmp_path):
    points = evaluate.sweep_of(["cfg_scale=1,2"])
    rows = evaluate.run(
        judges, points, lambda point: evaluate.of_source(source, point, source.sampler, 8, "shuffled", 0), tmp_path
    )
    assert rows[0][1]["clip_score"] != rows[1][1]["clip_score"]
    assert (tmp_path / "sweep.csv").read_text().startswith("cfg_scale,clip_score\n")
    assert (tmp_path / "sweep.png").exists()


def test_the_evaluator_of_a_run_scores_as_the_program_does(workdir, source, undisturbed):
    built = build.build(configs.load(workdir, trust=True), source.space)
    evaluator = configs.make("evaluators", built.config.evaluators.clip, "config.evaluators.clip", SampleSpec.of(built))

    def sample(y, first=0):
        return source.sampler(source.params, source.frozen, y, 0, first=first)

    assert dict(evaluator(Current(None, None, sample))) == pytest.approx(undisturbed[1], rel=1e-6)


def test_a_network_evaluates_itself_from_python(workdir, clip, undisturbed, tmp_path):
    model = network.load(workdir, trust_workdir=True)
    found = model.evaluate(NUM, extractor=f"clip={clip}", labels="shuffled", out=tmp_path)
    assert found == undisturbed[1]


def test_protocols_of_captions_take_what_their_papers_take():
    def of(name):
        one = presets.PROTOCOLS[name]
        options = (one.sampler[key] for key in ("solver", "steps", "cfg_scale", "guidance_channels"))
        return (*options, one.labels, one.rounding, one.num)

    assert of("coco30k") == ("euler", 50, 2.0, None, "shuffled", "nearest", 30_000)
    assert of("uvit") == ("dpm_solver_pp", 50, 2.0, None, "shuffled", "nearest", 30_000)
    assert of("repa_coco") == ("euler", 50, 2.0, None, "data", "floor", 40_192)
    assert of("repa_coco_sde") == ("euler_maruyama", 250, 2.0, None, "data", "floor", 40_192)
    assert presets.PROTOCOLS["repa_coco_sde"].sampler["last_step"] == 0.04
    assert presets.PROTOCOLS["repa"].num == 50_000

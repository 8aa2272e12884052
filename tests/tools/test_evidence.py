"""The evidence study: its lanes are runs, it goes on after a kill, and its statistics are right. And its classifier."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diversedit_jax import data, train
from diversedit_jax.data.levels import Levels, shrunk
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.evaluation import extractors
from diversedit_jax.evaluation.extractors import small_resnet
from diversedit_jax.runs import build, trained
from diversedit_jax.runtime.pictures import image_grid
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests.data.test_in_memory import clothes  # noqa: F401 (a fixture)
from tools.studies import classifier
from tools.studies.evidence import report
from tools.studies.evidence.lanes import Engine, Group, Lane
from tools.studies.evidence.settings import FORMS, METHODS, PIECES, SIZES, TUNING_SEED, config_of
from tools.studies.evidence.statistics import at_time, mean, paired_ratio
from tools.studies.evidence.study import HERE, SHOWN, OutOfTime, Study

MODEL = {"depth": 2, "width": 16, "heads": 2, "patch": 8}


@pytest.fixture
def size(clothes, tmp_path):  # noqa: F811
    """A size with six images, two steps in each piece, and an untrained classifier."""
    folder, _ = clothes
    file = tmp_path / "classifier.safetensors"
    params = classifier.initial(channels=1, widths=(4, 8), classes=10)
    classifier.save(file, classifier.folded(params, np.zeros((4, 32, 32, 1), np.uint8)), {})
    small = {"batch": 8, "steps": 2 * PIECES, "num": 20, "held_out": 4, "blocks": 4, "seeds": 2}
    sampler = {"solver": "euler", "steps": 2, "cfg_scale": 1.0, "batch_size": 20}
    data = ("fashion", {"size": 16, "data_dir": str(folder)})
    return SIZES["cpu"]._replace(**small, data=data, features=str(file), model=MODEL, sampler=sampler)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "factor"), [("both", 0.5), ("sra_both", 1.0)])
def test_a_lane_is_the_run_of_its_seed(size, row, factor, tmp_path):
    group = Group(Engine(size, row), [Lane(3, factor), Lane(0, 1.0)])
    for _ in range(PIECES):
        group.train()
    config = config_of(size, row, seed=3)
    config.optim.learning_rate *= factor
    config.samples.num = 0
    train.run(config, tmp_path / "run")
    wanted = trained.of_run(tmp_path / "run").load(size.steps, "ema")
    found = jax.tree.map(lambda leaf: leaf[0], jax.device_get(group.states["ema"]))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    assert [len(piece["diversity/weight"]) for piece in group.trace] == [2] * PIECES


@pytest.mark.slow
def test_a_study_that_is_cut_off_goes_on_with_the_same_numbers(size, tmp_path, capsys):
    def results(out):
        found = {path.name: json.loads(path.read_text()) for path in sorted(out.rglob("seed*.json"))}
        return {name: {k: v for k, v in one.items() if k not in ("seconds", "about")} for name, one in found.items()}

    whole = Study(size, tmp_path / "whole")
    whole.compare(["sit"], [0, 1])
    cut = Study(size, tmp_path / "cut")
    turn, turns = cut._advance, []

    def stopping(*arguments):
        if len(turns) == 5:
            raise KeyboardInterrupt
        turns.append(turn(*arguments))

    cut._advance = stopping
    with pytest.raises(KeyboardInterrupt):
        cut.compare(["sit"], [0, 1])
    assert len(results(tmp_path / "cut")) == 4  # two seeds at 25% and 50%
    with pytest.raises(OutOfTime):
        Study(size, tmp_path / "cut", deadline=0.0).compare(["sit"], [0, 1])
    Study(size, tmp_path / "cut").compare(["sit"], [0, 1])
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert len(results(tmp_path / "whole")) == 6
    assert not list((tmp_path / "cut" / "states").rglob("seed*")), "states of runs that are done"
    with Image.open(next((tmp_path / "whole").rglob("*.png"))) as image:
        assert image.mode == "L"

    report.write(whole)
    assert "| SiT | 2 | 1 | 1 |" in (tmp_path / "whole" / "table.md").read_text()
    assert "turn 8 of 8" in capsys.readouterr().out


def made_up(study, row, lane, step, frechet):
    """Write a result."""
    rng, blocks = np.random.default_rng([len(row), lane.seed, step]), study.size.model["depth"]
    matrix = {name: rng.uniform(size=(blocks, blocks)).tolist() for name in ("cka", "cosine", "centred_cosine")}
    lines = {name: rng.uniform(1, 9, size=blocks).tolist() for name in ("mean_share", "norm", "rank")}
    scores = {name: float(rng.uniform()) for name in ("kid", "accuracy", "precision", "recall")}
    part = {"grad_norm": 1.0} | ({"diversity/loss": 0.2, "diversity/active": 0.75} if row == "both" else {})
    result = {"row": row, **lane._asdict(), "step": step, "seconds": step * (1.25 if row == "both" else 1.0)}
    result |= {"velocity": rng.uniform(size=5).tolist(), "blocks": matrix | lines, "frechet": frechet, **scores}
    result |= {"trace": [part] * (PIECES * step // study.size.steps), "about": {"command": "study", "jax": "1.2"}}
    file = study.file(row, lane, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    Image.fromarray(np.zeros((64, 160), np.uint8)).save(file.with_suffix(".png"))


def test_the_report_compares_at_equal_steps_and_at_equal_time(size, tmp_path):
    study, tuned, end = Study(size, tmp_path), Study(size, tmp_path / "tuned"), size.steps
    for row, factor in (("sit", 1.0), ("both", 0.8)):
        for seed in range(3):
            for part, frechet in ((4, 400), (2, 200), (1, 100 + seed)):
                made_up(study, row, Lane(seed, 1.0), end // part, factor * frechet)
        for rate, frechet in ((1.0, 100.0), (0.5, 110.0)):
            for place in (study, tuned):
                made_up(place, row, Lane(TUNING_SEED, rate), end, factor * frechet)
    report.write(study)
    text = (tmp_path / "table.md").read_text()
    assert "| SiT | 3 | 1 | 1 | 1 | 1 | 101.00 ± 1.00 |" in text
    # When SiT has taken all its steps, the slower row is at 1 / 1.25 of its own: at 0.8 x 125 = 100 times a spread
    line = next(
        line for line in text.splitlines() if line.startswith("| DiverseDiT (both) | 3 | 1 | 0.800 [0.800, 0.800]")
    )
    same_time = float(line.split("|")[5].split("[")[0])
    assert same_time == pytest.approx(0.8 * 1.25, rel=0.01)
    assert line.split("|")[6].strip() == "1.25"
    assert f"| ratio to SiT after | {end // 4} steps | {end // 2} steps | {end} steps |" in text
    assert f"| DiverseDiT (both) |{' 0.800 [0.800, 0.800] |' * 3}" in text
    assert "training images (floor)" in text
    assert "- command: study\n- jax: 1.2\n" in text
    for file in study.folder("both").glob("seed*.json"):  # as if another call had made them, maybe on a slower day
        other = json.loads(file.read_text())
        file.write_text(json.dumps(other | {"about": other["about"] | {"command": "study --rows=both"}}))
    report.write(study)
    text = (tmp_path / "table.md").read_text()
    assert "| DiverseDiT (both) | 3 | 1 | 0.800 [0.800, 0.800] |  |  | 80.80 ± 0.80 |" in text
    assert "- command: study; study --rows=both\n" in text
    assert "| DiverseDiT (both) | 80.00 | 88.00 |" in text  # by learning rate
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section") == 8
    assert all(ord(letter) < 0x2500 for letter in page)
    cka = [report.off_diagonal(study.results("both")[seed][end], "cka") for seed in range(3)]
    base = [report.off_diagonal(study.results("sit")[seed][end], "cka") for seed in range(3)]
    wanted = np.exp(np.mean(np.log(np.divide(cka, base))))
    assert f"| CKA of blocks: both parts | CKA of blocks, DiverseDiT (both) / SiT | {wanted:.3f} [" in text
    assert "at equal cost" not in text  # the row of equal cost has no results
    assert "CKA of blocks, DiverseDiT (both) / SiT" in page
    report.write(tuned)
    table = (tmp_path / "tuned" / "table.md").read_text()
    assert table.startswith(f"| Fréchet distance of tuning, seed {TUNING_SEED} | rate x 1 | rate x 0.5 |")
    with pytest.raises(ConfigError, match="has no run of this size that is complete"):
        report.write(Study(size, tmp_path / "empty"))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_size_has_a_classifier_of_its_data(size):
    name, options = size.data
    side, channels = options.get("size", 32), {"fashion": 1, "cifar10": 3}[name]
    extractor = extractors.make("small_resnet", file=str(HERE / size.features))
    images = jax.ShapeDtypeStruct((1, side, side, channels), np.uint8)
    assert jax.eval_shape(extractor.apply, extractor.init(), images).logits.shape == (1, 10)


def test_held_out_images_of_every_class_are_shown(size, tmp_path, monkeypatch):
    labels = np.repeat(np.arange(10, dtype=np.int32), 150)  # sorted, as in a folder for each class
    images = np.full((1500, 16, 16, 1), (np.arange(1500) % 251).reshape(-1, 1, 1, 1), np.uint8)
    monkeypatch.setattr(build, "open_data", lambda *_: data.Dataset(Levels(images, labels), None, None))
    wanted = images.reshape(10, 150, 16, 16, 1).swapaxes(0, 1).reshape(-1, 16, 16, 1)[:SHOWN]
    np.testing.assert_array_equal(Study(size, tmp_path).shown(), image_grid(wanted, columns=10))


def test_the_better_learning_rate_of_tuning_is_taken(size, tmp_path):
    study = Study(size, tmp_path)
    assert study.factor("sit") == 1.0  # before tuning
    for factor, frechet in ((1.0, 3.0), (0.5, 2.0)):
        file = study.file("sit", Lane(TUNING_SEED, factor), size.steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"frechet": frechet}))
    assert study.factor("sit") == 0.5


def test_a_setting_is_known_by_its_digest(size, tmp_path):
    def name(**changes):
        return Study(size._replace(**changes), tmp_path).folder("sit").name

    moved = size.data[0], {**size.data[1], "data_dir": "elsewhere"}
    assert name() == name(data=moved) == name(seeds=9)
    assert len({name(), name(steps=32), name(num=10), name(rate=3e-3), name(model=MODEL | {"depth": 3})}) == 5


@pytest.mark.parametrize("row", METHODS | FORMS)
def test_rows_differ_and_can_be_built(row, size):
    config = config_of(SIZES["cpu"]._replace(data=size.data), row)
    plain = config_of(SIZES["cpu"]._replace(data=size.data), "sit")
    assert (config.to_dict() == plain.to_dict()) == (row == "sit")
    build.build(config, build.open_data(config).space)


def test_ratios_are_paired_by_seed_and_intervals_are_students():
    base = {0: 100.0, 1: 50.0, 2: 200.0, 3: 80.0}
    ours = {0: 90.0, 1: 44.0, 2: 190.0, 3: 70.0, 7: 1.0}  # seed 7 has no partner
    found = paired_ratio(ours, base)
    logs = np.log([ours[seed] / base[seed] for seed in base])
    wanted = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    np.testing.assert_allclose(found, np.exp([logs.mean(), wanted.low, wanted.high]))
    assert str(found).startswith(f"{found.value:.3f} [")
    assert str(mean([2.0])) == "2.000"
    alone = paired_ratio({0: 2.0}, {0: 4.0})
    assert (alone.value, np.isnan(alone.low)) == (pytest.approx(0.5), True)


def test_values_at_a_time_lie_between_the_measured_ones():
    seconds, values = [10.0, 20.0, 40.0], [8.0, 4.0, 2.0]  # value = 80 / seconds
    assert at_time(seconds, values, 10.0) == pytest.approx(8)
    assert at_time(seconds, values, 25.0) == pytest.approx(80 / 25)
    assert at_time(seconds, values, 40.0) == pytest.approx(2)
    assert np.isnan(at_time(seconds, values, 5.0))


# --- The classifier.


def shaded(seed: int, count: int) -> Levels:
    """Noisy images of two classes: dark above, or dark below."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count).astype(np.int32)
    images = rng.integers(256, size=(count, 32, 32, 1), dtype=np.uint8)
    images[labels == 0, :16] //= 2
    images[labels == 1, 16:] //= 2
    return Levels(images, labels)


@pytest.mark.slow
def test_a_classifier_learns_and_is_read_back(tmp_path, capsys):
    train, test = shaded(0, 1024), shaded(1, 200)
    weights, share, coarse = classifier.train(train, test, widths=(8, 16), epochs=10, devices=jax.devices()[:2])
    assert min(share, coarse) > 0.97
    assert "epoch 10 of 10" in capsys.readouterr().out
    file = tmp_path / "classifier.safetensors"
    classifier.save(file, weights, {})
    extractor = extractors.make("small_resnet", file=str(file))
    found = extractor.apply(extractor.init(), jnp.asarray(test.images))
    assert found.pool.shape == (200, 16)
    assert np.mean(np.argmax(found.logits, axis=1) == test.labels) == pytest.approx(share)
    small = shrunk("size", test.images, 16)
    found = extractor.apply(extractor.init(), jnp.asarray(small))
    assert np.mean(np.argmax(found.logits, axis=1) == test.labels) == pytest.approx(coarse)
    with pytest.raises(ConfigError, match=r"small_resnet: wanted images \[32, 32, 1\], given \[32, 32, 3\]"):
        extractor.apply(extractor.init(), jnp.zeros((1, 32, 32, 3), jnp.uint8))


@pytest.mark.parametrize("stem", [3, 4])
def test_folded_norms_give_the_logits_of_the_norms(stem):
    images = jnp.asarray(shaded(2, 64).images)
    params = classifier.initial(channels=1, widths=(4, 8, 8), classes=3, stem=stem)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    wanted, _ = classifier.forward(params, images)
    folded = jax.tree.map(np.float32, classifier.folded(params, images))  # rounded to float16
    np.testing.assert_allclose(small_resnet.apply(folded, images).logits, wanted, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("about", [{}, {"side": "17"}, {"side": "many"}])
def test_other_files_are_no_classifier(about, tmp_path):
    file = tmp_path / "other.safetensors"
    write_safetensors(file, {"a/kernel": np.zeros((2, 2), np.float32)}, about)
    with pytest.raises(WeightsError, match=r"is not a classifier that tools/studies/classifier\.py has written"):
        extractors.make("small_resnet", file=str(file))

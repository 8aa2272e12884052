"""The page of a run: what it shows, of any metrics and any config, and that a browser opens it."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.analysis import known_scores, run_report
from diversedit_jax.config import slot
from diversedit_jax.runtime.pictures import picture, save, save_png
from tests import browser
from tests.test_train import tiny

COMMAND = "python -m diversedit_jax.train --config=configs/digits.py --workdir='a <run>'"


def lines(steps: int = 8) -> list[dict]:
    """The metrics of a run that is scored every second step. One loss is not finite at step 3."""
    found = []
    for step in range(1, steps + 1):
        terms = {"loss/total": "nan" if step == 3 else 2 / step, "loss/objective": 1.5 / step, "loss/diversity": 0.1}
        rest = {"diversity/weight": 10.0**-step, "grad_norm": 0.5, "learning_rate": 1e-4 * step}
        found.append({"step": step, "time": 0.0, **terms, **rest, "steps_per_sec": 4.0, "images_per_sec": 64.0})
        if step % 2 == 0:
            scores = {"digits/accuracy": [0.2, 0.9, 0.7, 0.8][step // 2 - 1], "digits/frechet": 10 / step}
            found.append({"step": step, "time": 0.0, **scores, "digits/frechet_floor": 0.4, "digits/ceiling": 0.99})
    return [*found, {"step": steps, "time": 0.0, "digits/fid": 3.0, "digits/fid_std": 0.25}]


def configured():
    made = tiny(total_steps=8, model__size="<&>")
    made.evaluators.digits = slot("evaluators", "digits", num=10)
    return made


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a run leaves. Its last pictures are larger than the page shows them."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    (folder / "versions.json").write_text(json.dumps({"jax": "0.10.2", "devices": "1 x cpu", "backend": "cpu"}))
    for step, side in [(2, 30), (4, 30), (8, 2 * run_report.LARGE + 100)]:
        save_png(folder / "samples" / f"{step:07d}.png", np.full((side, side, 1), 90, np.uint8))
    (folder / "samples" / "mine.png").write_bytes(b"not of the run")
    return folder


@pytest.fixture(scope="module")
def page(workdir):
    run_report.write(workdir, run_report.Facts(configured(), 8, 345_988, COMMAND, "videos"))
    return (workdir / "report.html").read_text()


def test_grids_of_videos_move_on_the_page(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (4, 3, 200, 300, 1), dtype=np.uint8)
    for step in (2, 4):
        save(tmp_path / f"{step:07d}.png", picture(videos, video=True))
    early, last = re.findall(r"data:image/(\w+);base64,([^\"]+)", run_report.samples(tmp_path))
    assert early[0] == "jpeg", "made smaller, so that it does not move"
    assert last[0] == "gif"
    assert base64.b64decode(last[1]) == (tmp_path / "0000004.gif").read_bytes()


def rows(page: str) -> list[str]:
    return [re.sub(r"<[^>]+>", "|", row).strip("|") for row in re.findall("<tr.*?</tr>", page)]


def test_a_page_says_what_was_trained(page):
    assert "<h1>a &lt;run&gt;</h1>" in page
    said = re.search("<p>(<strong>dit.*?)</p>", page)[1]
    assert re.sub("</?strong>", "", said) == (
        "dit (depth 4, heads 2, size &lt;&amp;&gt;, skip release, width 16) with 345,988 parameters on digits, "
        "trained by flow_matching (time logit_normal) + diversity for 8 steps of 16 videos."
    )
    assert "<dd>8 of 8</dd>" in page
    assert "<dd>4 steps/s, 64 videos/s (median)</dd>" in page
    assert "# train on, after a stop or with more steps\npython -m diversedit_jax.train --config=configs/digits" in page
    for program in ("sample", "evaluate", "analyze"):
        assert re.search(rf"python -m diversedit_jax.{program} --workdir=&#x27;/.*a &lt;run&gt;&#x27;", page)
    assert "<dt>jax</dt><dd>0.10.2</dd>" in page


def test_scores_are_there_with_the_best_and_its_step(page):
    found = [row.split("||") for row in rows(page) if row.startswith("digits/")]
    assert found == [
        ["digits/accuracy ↑", "0.8000", "8", "0.9000", "4"],
        ["digits/frechet ↓", "1.25", "8", "1.25", "8"],
        ["digits/ceiling", "0.9900", "8"],
        ["digits/fid ↓", "3 ± 0.2500", "8", "3", "8"],
    ]


def test_the_metric_that_chooses_checkpoints_says_which_way_is_better(workdir):
    config = configured()
    config.checkpoint.update({"best": 1, "metric": "digits/accuracy", "lower": True})
    found = run_report.scores_section(run_report.read(workdir / "metrics.jsonl"), ("digits/",), config)
    assert "digits/accuracy ↓||0.8000||8||0.2000||2" in rows(found)


def test_a_score_that_is_not_finite_is_never_the_best():
    curves = {"digits/fid": run_report.Curve(np.arange(1, 5), np.array([np.nan, -np.inf, 3.0, np.inf]))}
    found = run_report.scores_section(curves, ("digits/",), configured())
    assert "digits/fid ↓||inf||4||3||3" in rows(found)


def test_a_command_that_is_not_known_is_a_call(workdir):
    assert "train.run(config, " in run_report.commands_section(workdir, None)


def test_the_config_is_there_and_what_differs_is_marked(page):
    marked = {row.partition("<td>")[2].partition("<")[0] for row in re.findall("<tr class=changed>.*?</tr>", page)}
    assert {"model.depth", "model.width", "optim.learning_rate", "sampler.solver", "evaluators.digits.num"} <= marked
    assert not marked & {"losses.diversity.preset", "model.patch", "data.data_dir", "seed"}
    assert "seed||0" in rows(page)
    assert marked == run_report.changed(configured())


def test_small_pictures_are_kept_and_large_ones_made_smaller(page, workdir):
    found = re.findall(r'<figure><img alt="(.*?)" width="(\d+)" src="data:image/(\w+);', page)
    assert found == [
        ("samples at step 2", "30", "png"),
        ("samples at step 4", "30", "png"),
        ("samples at step 8", "700", "jpeg"),
    ]
    assert "http" not in page.replace("http-equiv", "")


def test_what_is_drawn_and_in_which_order(workdir):
    curves = run_report.read(workdir / "metrics.jsonl")
    assert np.isnan(curves["loss/total"].values[2])
    assert run_report.chosen(curves, ("digits/",)) == [
        *("loss/total", "loss/objective", "loss/diversity", "diversity/weight"),
        *("grad_norm", "learning_rate", "steps_per_sec", "digits/accuracy", "digits/frechet"),
    ]


@pytest.mark.parametrize(
    ("values", "scale", "title"),
    [
        ([1.0, 2.0, 3.0], "linear", "m"),
        ([1.0, 0.1, 0.001], "log", "m"),
        ([1.0, 0.1, -0.001], "linear", "m"),
        ([np.nan, np.inf], "linear", "m (not finite: 2)"),
        ([5.0], "linear", "m"),
        ([5.0] * 200, "linear", "m"),
        (np.geomspace(1, 100, 200), "log", "m"),
    ],
)
def test_any_values_are_drawn(values, scale, title):
    axes = run_report.Figure().subplots()
    curve = run_report.Curve(np.arange(len(values)), np.array(values))
    run_report.panel(axes, "m", curve, False, None)
    assert (axes.get_yscale(), axes.get_title("left")) == (scale, title)


def test_a_mean_over_neighbours_ends_where_the_values_end():
    np.testing.assert_allclose(run_report.smoothed(np.arange(6.0), 3), [0.5, 1, 2, 3, 4, 4.5])


def test_no_metrics_and_many():
    with Image.open(io.BytesIO(run_report.draw([], {}, ()))) as image:
        assert image.width == 1400
    odd = r"loss/long $\x$ " * 3
    curves = {f"{odd}{i}": run_report.Curve(np.arange(3), np.arange(3.0)) for i in range(20)}
    with Image.open(io.BytesIO(run_report.draw(list(curves), curves, ()))) as image:
        assert image.size == (1400, 1960), "7 rows"


def test_which_scores_are_better_if_lower():
    lower = ("a/fid", "a/sfid", "fd_dinov2", "sfd_x", "kid", "kd_digits", "frechet")
    assert all(known_scores.lower_is_better(name) for name in lower)
    assert not any(known_scores.lower_is_better(name) for name in ("inception_score_x", "a/precision", "recall"))
    assert known_scores.lower_is_better("blocks/norm") is None


@pytest.mark.skipif(browser.find() is None, reason="no Chromium: apt-get install chromium")
def test_the_page_opens_in_a_browser(page, workdir):
    for width in (1200, 390):
        seen = browser.look(workdir / "report.html", width)
        assert not seen.messages
        assert seen.requests == [(workdir / "report.html").as_uri()]
        assert len(seen.images) == 4
        assert all(image["complete"] and image["naturalWidth"] > 20 and image["alt"] for image in seen.images)
        assert seen.width <= seen.viewport, "a reader would have to scroll sideways"
        assert "a <run>" in seen.text

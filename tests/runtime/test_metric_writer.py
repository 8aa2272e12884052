"""What a run writes about itself can be read back, also after a kill."""

import io
import json
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diversedit_jax.runtime.cli import _not_routine, silence
from diversedit_jax.runtime.metric_writer import MetricWriter
from diversedit_jax.runtime.pictures import LINE, image_grid, picture, save_png
from diversedit_jax.runtime.progress import Progress, duration
from diversedit_jax.runtime.versions import parameter_overview, versions


def lines_of(directory):
    def refuse(constant):
        raise ValueError(f"not JSON: {constant}")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events_of(directory):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    return events


# Metrics.


def test_scalars_are_lines_of_valid_json(tmp_path, caplog):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"loss": jnp.float32(0.5), "lr": 1e-3})
        writer.write_scalars(2, {"loss": np.nan, "grad": np.float32(-np.inf)})
        assert len(lines_of(tmp_path)) == 2  # a kill loses no line that was written
    first, second = lines_of(tmp_path)
    assert isinstance(first.pop("time"), float)
    assert first == {"step": 1, "loss": 0.5, "lr": 1e-3}
    assert (second["loss"], second["grad"]) == ("nan", "-inf")
    assert not caplog.records


def test_resume_drops_what_came_after_and_a_torn_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')
    with MetricWriter(tmp_path, start_step=20) as writer:
        assert [line["step"] for line in lines_of(tmp_path)] == [10, 20]
        writer.write_scalars(30, {"loss": -30})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(10, 10), (20, 20), (30, -30)]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert [(e.step, e.value) for e in events_of(tmp_path).Scalars("loss")] == [(10, 10), (20, 20), (30, -30)]


def test_tensorboard_reads_every_kind(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(3, {"loss": 0.25})
        writer.write_images(3, {"grey": np.full((8, 8, 1), 128, np.uint8), "coloured": np.zeros((16, 24, 3), np.uint8)})
        writer.write_hparams({"lr": 1e-3, "name": "dit", "ema": True, "mesh": (2, 4)})
    events = events_of(tmp_path)
    tags = events.Tags()
    assert tags["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25)]
    assert sorted(tags["images"]) == ["coloured", "grey"]
    image = np.asarray(Image.open(io.BytesIO(events.Images("grey")[0].encoded_image_string)))
    assert image.shape == (8, 8, 3)
    assert (image == 128).all()
    assert (events.Images("coloured")[0].height, events.Images("coloured")[0].width) == (16, 24)


def test_tensorboard_gets_pictures_that_move(tmp_path):
    moving = picture(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 48, 1), dtype=np.uint8), video=True).moving
    with MetricWriter(tmp_path) as writer:
        writer.write_moving(3, {"samples_moving": moving})
    (found,) = events_of(tmp_path).Images("samples_moving")
    assert (found.step, found.height, found.width) == (3, 36, 52)
    assert found.encoded_image_string == moving


# Progress.


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_off_a_terminal():
    stream, clock = io.StringIO(), Clock()
    with Progress(1500, 0, 128, "images", stream=stream, clock=clock) as progress:
        for step in range(1, 201):
            clock.now += 30 if step == 1 else 0.1
            progress.update(step)
            if step == 100:
                progress.report(step, {"loss": jnp.float32(0.5)})
                progress.note("saved step 100")
        rates = progress.report(200, {"loss": 0.43124, "grad_norm": 1.0})
    assert stream.getvalue().splitlines() == [
        "step  100/1500  10 steps/s  1,280 images/s  eta 2m20s  loss 0.5",
        "saved step 100",
        "step  200/1500  10 steps/s  1,280 images/s  eta 2m10s  loss 0.4312  grad_norm 1",
    ]
    assert "\r" not in stream.getvalue()
    assert rates == pytest.approx({"steps_per_sec": 10, "images_per_sec": 1280})


def test_the_rate_leaves_out_compilation_and_pauses():
    clock = Clock()
    progress = Progress(40, 10, 8, "images", stream=io.StringIO(), clock=clock)
    clock.now += 60  # compilation
    progress.update(11)
    assert progress.report(11, {}) == {}
    clock.now += 1
    with progress.pause():
        clock.now += 1000
    clock.now += 1
    assert progress.report(15, {}) == pytest.approx({"steps_per_sec": 2, "images_per_sec": 16})
    clock.now += 10
    assert progress.report(20, {}) == pytest.approx({"steps_per_sec": 0.5, "images_per_sec": 4})


def test_a_bar_on_a_terminal():
    stream, clock = Terminal(), Clock()
    with Progress(20, 10, 4, "videos", stream=stream, clock=clock) as progress:
        for step in range(11, 21):
            clock.now += 0.5
            progress.update(step)
            if step == 15:
                progress.report(15, {"loss": 0.75})
        progress.note("a note")
        progress.report(20, {"loss": 0.5, "diversity": -0.0})
    shown = stream.getvalue()
    assert "20/20, 2 steps/s  8 videos/s  eta 0s" in shown
    for line in ("a note", "step 15/20  2 steps/s  8 videos/s  eta 2s  loss 0.75"):
        assert f"\r{line}\n" in shown  # on a line of its own, the bar cleared before it: losses stay on the screen
    assert "eta 0s  loss 0.5  diversity 0\n" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (97, "1m37s"), (7500, "2h05m"), (3 * 86400 + 4 * 3600, "3d04h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# Versions, tables, images, silence.


def test_versions_name_what_the_numbers_depend_on():
    found = versions()
    assert found["jax"] == jax.__version__
    assert {"python", "diversedit_jax", "flax", "optax", "orbax-checkpoint", "numpy", "backend", "devices"} <= set(
        found
    )
    assert all(isinstance(value, str) and value for value in found.values())


def test_parameter_overview_needs_no_arrays():
    params = {"blocks": {"kernel": jax.ShapeDtypeStruct((28, 64, 96), jnp.float32)}, "bias": np.zeros(5, np.float32)}
    table = parameter_overview(params)
    assert "blocks/kernel" in table
    assert "(28, 64, 96)" in table
    assert f"{28 * 64 * 96 + 5:,}" in table


def test_a_grid_enlarges_digits_and_keeps_every_pixel():
    digits = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 1), dtype=np.uint8)
    grid = image_grid(digits)
    assert grid.shape == (2 * 34 + 2, 3 * 34 + 2, 1)  # 2 rows, 3 columns of 32 pixels, gaps of 2
    assert grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[36:68:4, 36:68:4], digits[4])
    assert (grid[36:, 70:] == 255).all()  # no sixth image
    assert (grid[:2] == 255).all()


def test_a_grid_of_large_images_keeps_their_size():
    images = np.zeros((3, 64, 40, 3), np.uint8)
    assert image_grid(images).shape == (2 * 66 + 2, 2 * 42 + 2, 3)
    assert image_grid(images, columns=3).shape == (66 + 2, 3 * 42 + 2, 3)
    assert image_grid(images, columns=1).shape == (3 * 66 + 2, 42 + 2, 3)


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (["0", "1", "2", "0", "1", "2"], "once above each column"),
        (["0", "0", "0", "1", "1", "1"], "once beside each row"),
        (["0", "0", "1", "0", "1", "1"], "above every image"),
    ],
)
def test_a_grid_has_names_where_they_say_most(names, place):
    digits = np.random.default_rng(0).integers(1, 255, (6, 8, 8, 3), dtype=np.uint8)
    plain, grid = image_grid(digits, 3), image_grid(digits, 3, names)
    height, width = plain.shape[:2]
    if place == "once above each column":
        images, wanted = grid[16:], plain
    elif place == "once beside each row":
        images, wanted = grid[:, -width:], plain
    else:
        rows = [slice(2 + 34 * row, 2 + 34 * row + 32) for row in range(2)]
        images = np.stack([grid[row.start + 16 * (1 + i) : row.stop + 16 * (1 + i)] for i, row in enumerate(rows)])
        wanted = np.stack([plain[row] for row in rows])
        height += 32
    np.testing.assert_array_equal(images, wanted, "a name covers an image")
    assert (grid == 0).any(), "names are black, and no pixel of the images is"
    assert grid.shape[0] == height + (16 if place == "once above each column" else 0)


def test_small_images_grow_with_their_names_up_to_a_limit():
    digits = np.zeros((4, 8, 8, 1), np.uint8)
    long, longer = (image_grid(digits, 4, [word] * 3 + ["0"]).shape[1] for word in ("automobile", "automobile" * 20))
    assert 4 * 34 + 2 < long < longer == 4 * 98 + 2


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png_round_trips_and_leaves_no_other_file(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, channels), dtype=np.uint8)
    save_png(tmp_path / "grid.png", image)
    with Image.open(tmp_path / "grid.png") as file:
        np.testing.assert_array_equal(np.asarray(file).reshape(image.shape), image)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_silence_drops_orbax_and_keeps_others(caplog):
    silence()
    silence()
    logger = logging.getLogger("absl")
    assert logger.filters.count(_not_routine) == 1
    for place, level, shown in [("orbax/a.py", 40, False), ("grain/a.py", 20, False), ("grain/a.py", 30, True)]:
        record = logging.LogRecord("absl", level, f"/x/{place}", 1, "message", None, None)
        assert bool(logger.filter(record)) is shown, place


def test_a_long_name_takes_several_lines_and_is_cut_at_the_last():
    images = np.full((2, 96, 96, 3), 200, np.uint8)
    one, two, many = (
        image_grid(images, columns=2, names=[text, "a bus"])
        for text in (
            "a car",
            "one red seven here",
            "a man who walks his dog in the park on a rainy day " * 3,
        )
    )

    assert [len(grid) - len(one) for grid in (two, many)] == [LINE, 3 * LINE]
    ink = many[: 4 * LINE, : 96 + 2].min(axis=(1, 2)).reshape(4, LINE).min(axis=1)
    assert ink.max() < 128  # every line has words
    assert two[:LINE, 100:].min() == 255  # a short name stands at its image

"""Pictures of videos and volumes: where frames, views, slices and names stand, and what moves."""

import io

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.runtime import pictures
from diversedit_jax.runtime.pictures import LINE, image_grid, picture, save, views


def videos(n=3, frames=4, side=32, channels=1):
    return np.random.default_rng(0).integers(1, 255, (n, frames, side, side, channels), dtype=np.uint8)


def frames_of(content):
    with Image.open(io.BytesIO(content), formats=("GIF",)) as file:
        assert file.info["loop"] == 0, "it has no end"
        shown = []
        for number in range(file.n_frames):
            file.seek(number)
            assert 100 <= file.info["duration"] <= 150
            shown.append(np.asarray(file.convert("RGB")))
        return np.stack(shown)


def test_a_video_is_a_row_of_its_frames_with_its_name():
    samples = videos()
    found = picture(samples, ["one", "two", "three"], video=True)
    plain = image_grid(samples.reshape(-1, 32, 32, 1), columns=4)
    assert plain.shape == (3 * 34 + 2, 4 * 34 + 2, 1)
    assert found.still.shape[0] == plain.shape[0]
    np.testing.assert_array_equal(found.still[:, -plain.shape[1] :], plain)
    names = found.still[:, : -plain.shape[1]]
    for row in range(3):
        assert names[34 * row : 34 * (row + 1)].min() < 128, "each row has its name"
    same = picture(samples, ["one"] * 3, video=True).still
    assert same.shape[0] == plain.shape[0], "also if all names are the same"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_moving_grid_shows_each_frame_of_all_videos(channels):
    samples = videos(channels=channels)
    if channels == 3:
        samples = np.broadcast_to(samples[..., :1] // 64 * 64, samples.shape)  # so few colours that a GIF has all
    shown = frames_of(picture(samples, video=True).moving)
    wanted = np.stack([image_grid(samples[:, i]) for i in range(4)])
    np.testing.assert_array_equal(shown, np.broadcast_to(wanted, shown.shape))


def test_names_stand_above_moving_videos():
    samples = videos()
    shown = frames_of(picture(samples, ["1", "2", "3"], video=True).moving)
    assert shown.shape[1] == 2 * (34 + LINE) + 2
    assert (shown[0, 2 : LINE + 2] == shown[1:, 2 : LINE + 2]).all()
    assert shown[0, 2 : LINE + 2].min() < 128


def test_large_videos_are_fewer_and_long_ones_have_fewer_frames():
    many = videos(70, 3, 128)
    found = picture(many, video=True)
    assert found.still.shape[:2] == (31 * 130 + 2, 3 * 130 + 2)
    assert frames_of(found.moving).shape[1:3] == (7 * 130 + 2,) * 2
    columns = picture(many, video=True, columns=10)
    assert frames_of(columns.moving).shape[1:3] == (4 * 130 + 2, 10 * 130 + 2), "whole rows of as many"
    long = picture(videos(2, 40), video=True)
    assert long.still.shape[1] == 16 * 34 + 2
    assert len(frames_of(long.moving)) == 40


def test_a_volume_is_seen_from_three_sides_and_slice_by_slice():
    volume = np.zeros((1, 6, 8, 10, 1), np.uint8)
    volume[0, 1:3, 2:6, 3:9] = 200
    found = views(volume)
    assert found.shape == (1, 3 + 1 + 6, 8, 10, 1)
    front, above, side, gap, *slices = found[0, ..., 0]
    np.testing.assert_array_equal(front, volume[0, 1, :, :, 0])
    np.testing.assert_array_equal(above[1:7], volume[0, :, 2, :, 0])
    assert (above[[0, 7]] == 255).all(), "what is smaller has a white margin"
    np.testing.assert_array_equal(side[1:7, 1:9], volume[0, :, :, 3, 0])
    assert (gap == 255).all()
    np.testing.assert_array_equal(slices, volume[0, ..., 0])
    assert len(views(np.zeros((1, 64, 4, 4, 3), np.uint8))[0]) == 4 + 16
    assert (views(np.zeros((1, 4, 4, 4, 1), np.uint8))[0, :3] == 0).all()


def test_a_thin_part_is_darker_than_a_thick_one():
    wedge = np.zeros((1, 8, 8, 8, 1), np.uint8)
    for i in range(8):
        wedge[0, : i + 1, :, i] = 160
    front = views(wedge)[0, 0, 0, :, 0]
    np.testing.assert_array_equal(front, 20 * np.arange(1, 9))


def test_volumes_do_not_move_and_have_a_row_each():
    found = picture(np.zeros((2, 8, 32, 32, 1), np.uint8), ["cube", "ball"])
    assert found.moving is None
    assert found.still.shape[0] == 2 * 34 + 2


def test_images_and_rows_of_numbers_are_a_grid():
    images = np.zeros((4, 32, 32, 2), np.uint8)
    np.testing.assert_array_equal(picture(images, list("abcd")).still, image_grid(images[..., :1], names=list("abcd")))
    assert picture(images).moving is None
    assert picture(np.zeros((4, 32, 1), np.uint8)).still.shape[0] == 2 * 34 + 2


def test_files_are_written_whole_and_the_still_one_last(tmp_path, monkeypatch):
    found = picture(videos(), video=True)
    assert save(tmp_path / "grid.png", found) == [tmp_path / "grid.png", tmp_path / "grid.gif"]
    assert (tmp_path / "grid.gif").read_bytes() == found.moving
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.gif", "grid.png"]
    assert save(tmp_path / "other.png", picture(videos()[:, 0])) == [tmp_path / "other.png"]

    def full(path, image):
        raise OSError("no space")

    monkeypatch.setattr(pictures, "save_png", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "third.png", found)
    assert not (tmp_path / "third.png").exists()

"""Collections of videos: every layout gives the frames that were written, and what is damaged or short is named."""

import io
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.data import videos
from diversedit_jax.data.videos import Sampling
from diversedit_jax.errors import ConfigError, DataError
from tests.data.test_image_collections import add

SIZE, COUNT = 32, 20
ALL = Sampling(COUNT)
# Codecs without loss, and the format of pixels that they take.
LOSSLESS = {
    ".mp4": ("libx264rgb", "rgb24", {"crf": "0"}),
    ".mov": ("libx264rgb", "rgb24", {"crf": "0"}),
    ".mkv": ("ffv1", "bgr0", {}),
    ".avi": ("ffv1", "bgr0", {}),
    ".webm": ("libvpx-vp9", "gbrp", {"lossless": "1"}),
}


def frames(number: int, count: int = COUNT) -> np.ndarray:
    """The frames of a video, uint8 [f 32 48 3], each of another noise."""
    return np.random.default_rng(number).integers(0, 256, (count, SIZE, 48, 3), dtype=np.uint8)


def middle(video: np.ndarray) -> np.ndarray:
    """The frames as they are cropped to SIZE pixels."""
    return video[:, :, 8:40]


def write(path, video, codec=None, pixels=None, options=None, title=None, **container):
    """A video file; without loss if no codec is given."""
    av = pytest.importorskip("av")
    if codec is None:
        codec, pixels, options = LOSSLESS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container) as file:
        file.metadata.update({"title": title} if title else {})
        stream = file.add_stream(codec, rate=25, options=options or {})
        (stream.height, stream.width), stream.pix_fmt = video.shape[1:3], pixels
        for one in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24").reformat(format=pixels)))
        file.mux(stream.encode())
    return path


def moving_picture(path, video):
    """An animated .gif or .webp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = map(Image.fromarray, video)
    first.save(path, save_all=True, append_images=rest, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


def png(frame) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return file.getvalue()


def folder_of_frames(path, video):
    """Frames whose names are not in the order of letters."""
    path.mkdir(parents=True)
    for number, frame in enumerate(video):
        (path / f"frame{number}.png").write_bytes(png(frame))
    return path


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            add(file, name, content)
    return path


def only(path, sampling=ALL, **options):
    """The clips of the only video of a collection."""
    found = videos.open_videos(path, **options)
    assert len(found) == 1
    return videos.clips(found, 0, sampling, SIZE)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_file_gives_the_frames_that_were_written(suffix, tmp_path):
    write(tmp_path / "class" / f"a{suffix}", frames(0))
    (clip,) = only(tmp_path)
    np.testing.assert_array_equal(clip, middle(frames(0)))


def test_a_file_with_colours_of_half_resolution_is_read(tmp_path):
    """Most files are so. The codec is lossless, and colours fill frames: rounding in Y, U and V moves B by up to
    1.16 / 2 + 2.02 / 2 levels, and rounding in B by another half. FFmpeg's tables may add one.
    """
    colours = np.random.default_rng(0).integers(0, 256, (COUNT, 1, 1, 3), dtype=np.uint8)
    video = np.broadcast_to(colours, (COUNT, SIZE, 48, 3)).copy()
    write(tmp_path / "a.mp4", video, "libx264", "yuv420p", {"crf": "0"})
    (clip,) = only(tmp_path)
    assert np.abs(clip.astype(int) - middle(video)).max() <= 3


def test_a_folder_of_frames_is_a_video_in_natural_order(tmp_path):
    folder_of_frames(tmp_path / "class" / "a", frames(0))
    (clip,) = only(tmp_path)
    np.testing.assert_array_equal(clip, middle(frames(0)))


def test_animated_pictures_are_videos(tmp_path):
    moving_picture(tmp_path / "w" / "a.webp", frames(0))
    np.testing.assert_array_equal(only(tmp_path / "w"), [middle(frames(0))])
    grey = frames(1)[..., 0]  # exact in a palette
    moving_picture(tmp_path / "g" / "a.gif", grey)
    np.testing.assert_array_equal(only(tmp_path / "g"), [np.repeat(grey[:, :, 8:40, None], 3, axis=-1)])


def test_the_content_decides_and_not_the_name(tmp_path):
    moving_picture(tmp_path / "a.webp", frames(0)).rename(tmp_path / "a.mp4")
    np.testing.assert_array_equal(only(tmp_path), [middle(frames(0))])


def test_classes_are_the_folders_at_the_top(tmp_path):
    folder_of_frames(tmp_path / "run" / "deep" / "a", frames(0, 2))
    moving_picture(tmp_path / "walk" / "b.webp", frames(1, 2))
    moving_picture(tmp_path / "walk" / "c.webp", frames(2, 2))
    Image.fromarray(frames(3)[0]).save(tmp_path / "walk" / "thumbnail.png")
    (tmp_path / "run" / "deep" / "a" / "notes.txt").write_text("")
    os.mkfifo(tmp_path / "walk" / "pipe.mp4")
    found = videos.open_videos(tmp_path)
    assert found.keys == ["run/deep/a", "walk/b.webp", "walk/c.webp"]
    assert (found.classes, found.labels.tolist()) == (("run", "walk"), [0, 1, 1])
    assert found.ignored == {"*.png beside a video": 1, "*.txt": 1, "pipe or device": 1}
    assert str(found) == f"3 videos, 2 classes: {tmp_path}"
    sent = pickle.loads(pickle.dumps(found))
    for index in range(3):
        np.testing.assert_array_equal(videos.clips(sent, index, Sampling(2), SIZE), [middle(frames(index, 2))])
    plain = videos.open_videos(tmp_path, unconditional=True)
    assert (plain.keys, plain.classes, plain.labels.tolist()) == (found.keys, (), [0, 0, 0])


def test_the_subfolder_of_a_split_is_taken(tmp_path):
    for number, split in enumerate(("train", "val")):
        moving_picture(tmp_path / split / "class" / "a.webp", frames(number, 2))
    for number, split in enumerate((None, "val")):
        np.testing.assert_array_equal(only(tmp_path, Sampling(2), split=split), [middle(frames(number, 2))])
    with pytest.raises(DataError, match=r"videos: .* has no split 'test'; its folders: train, val"):
        videos.open_videos(tmp_path, split="test")


def test_tar_files_hold_files_or_frames(tmp_path):
    file = write(tmp_path / "made" / "a.mp4", frames(0)).read_bytes()
    dotted = {f"b.{number:03d}.png": png(frame) for number, frame in enumerate(frames(1))}
    below = {f"set/c/{number}.png": png(frame) for number, frame in enumerate(frames(2))}
    beside = {
        "a.cls": b"2",
        "b.json": b'{"label": 0}',
        "set/c.cls": b"1",
        "a.jpg": b"",
        "a.txt": b"a man",
        "d.cls": b"0",
    }
    tar(tmp_path / "tars" / "0.tar", {"a.mp4": file} | dict(reversed(below.items())) | beside | dotted)
    found = videos.open_videos(tmp_path / "tars")
    assert found.keys == ["0.tar/a", "0.tar/b", "0.tar/set/c"]
    assert (found.classes, found.labels.tolist()) == (("0", "1", "2"), [2, 0, 1])
    assert found.ignored == {"*.jpg": 1, "*.txt": 1, "label without a video": 1}
    for index in range(3):
        np.testing.assert_array_equal(videos.clips(found, index, ALL, SIZE), [middle(frames(index))])
    plain = videos.open_videos(tmp_path / "tars" / "0.tar", unconditional=True)
    assert (plain.keys, plain.classes) == (found.keys, ())


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.mp4": b"", "a.webm": b""}, "a has several videos: a.mp4, a.webm"),
        ({"a.mp4": b"", "a.cls": b"walk"}, "a.cls is not a label: invalid literal"),
        ({"a.mp4": b"", "a.cls": b"1", "b.mp4": b""}, "0.tar/b in .* has no label, but others have one"),
        ({"a.png": b""}, r"holds no videos, but 1 x \*.png"),
    ],
)
def test_of_videos_of_one_name_or_without_a_label_none_is_lost(members, words, tmp_path):
    with pytest.raises(DataError, match=words) as error:
        videos.open_videos(tar(tmp_path / "0.tar", members))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(5), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]),
        (Sampling(6), [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]),
        (Sampling(3, 3), [[0, 3, 6], [9, 12, 15]]),
        (Sampling(3, 3, "first"), [[0, 3, 6]]),
        (Sampling(2, 19), [[0, 19]]),
    ],
)
def test_clips_are_of_every_nth_frame_and_do_not_overlap(sampling, wanted, tmp_path):
    moving_picture(tmp_path / "a.webp", frames(0))
    np.testing.assert_array_equal(only(tmp_path, sampling), middle(frames(0))[np.array(wanted)])
    assert sampling.shortest <= COUNT


def test_frames_are_cropped_as_images_are(tmp_path):
    moving_picture(tmp_path / "a.webp", frames(0, 2))
    found = videos.open_videos(tmp_path)
    for how, crop in videos.CROPS.items():
        (clip,) = videos.clips(found, 0, Sampling(2), 16, how)
        np.testing.assert_array_equal(clip, [crop(Image.fromarray(one), 16) for one in frames(0, 2)])


def test_a_video_that_is_too_short_is_told(tmp_path):
    moving_picture(tmp_path / "a.webp", frames(0))
    assert Sampling(2, 20).shortest == 21
    with pytest.raises(DataError, match=r"^a.webp: 20 frames, and the shortest clip takes 21$"):
        only(tmp_path, Sampling(2, 20))


def refused(path, words, sampling=ALL):
    with pytest.raises(DataError, match=rf"^{path.name}: {words}") as error:
        only(path.parent, sampling)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [*LOSSLESS, "faststart.mp4", ".webp", ".gif"])
def test_a_file_that_is_cut_off_is_refused(suffix, tmp_path):
    """FFmpeg itself takes the end of a .mkv or .webm for the end of the video."""
    path = tmp_path / f"a{suffix}"
    if path.suffix in videos.PICTURES:
        moving_picture(path, frames(0))
    else:
        write(path, frames(0), **({"movflags": "faststart"} if suffix == "faststart.mp4" else {}))
    only(tmp_path, Sampling(1))
    whole = path.read_bytes()
    for part in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(DataError, match=rf"^{path.name}: "):
            only(tmp_path, Sampling(1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"<html>not found</html>", "not a video that can be decoded: "),
        (b"#EXTM3U\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n", "not a video that can be decoded: "),
        (b"ffconcat version 1.0\nfile other.mp4\n", "not a video that can be decoded: "),
        (b"GIF89a", "not a moving picture that can be decoded: "),
    ],
)
def test_what_is_no_video_is_refused_and_no_other_file_is_opened(content, words, tmp_path):
    write(tmp_path / "other.mp4", frames(0))
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):  # beside the other file, which a playlist would name
        (folder / "list.mp4").write_bytes(content)
    refused(tmp_path / "set" / "list.mp4", words)
    found = videos.open_videos(tmp_path, unconditional=True)
    with pytest.raises(DataError, match=words):
        videos.clips(found, found.keys.index("list.mp4"), Sampling(1), SIZE)


def test_a_title_in_another_alphabet_does_no_harm(tmp_path):
    path = write(tmp_path / "a.avi", frames(0), title="cafe")
    content = path.read_bytes()
    assert content.count(b"cafe") == 1
    path.write_bytes(content.replace(b"cafe", b"caf\xe9"))
    np.testing.assert_array_equal(only(tmp_path), [middle(frames(0))])


def test_a_file_of_sound_alone_is_refused(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    refused(tmp_path / "a.mkv", "it holds no video that can be decoded")


def test_a_damaged_frame_is_named(tmp_path):
    path = folder_of_frames(tmp_path / "a", frames(0))
    (path / "frame11.png").write_bytes(png(frames(0)[11])[:900])
    refused(path, "frame 11: not an image that can be decoded: ")
    (clip,) = only(tmp_path, Sampling(10, 2))  # which does not use it
    np.testing.assert_array_equal(clip, middle(frames(0))[::2])
    (path / "frame4.png").unlink()
    (path / "frame4.png").symlink_to("nowhere")
    refused(path, "frame 4: cannot be read: No such file")


def test_sizes_and_durations_are_bounded(tmp_path, monkeypatch):
    write(tmp_path / "m" / "a.mp4", frames(0))
    moving_picture(tmp_path / "p" / "a.webp", frames(0))
    paths = [tmp_path / "m" / "a.mp4", tmp_path / "p" / "a.webp"]
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MAX_FRAMES", 19)
        for path in paths:
            refused(path, "more than 19 frames: cut it into shorter videos", Sampling(1))
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MAX_BYTES", 19 * 3 * SIZE**2)
        refused(paths[0], "its clips take more than 0 GiB: cut it into shorter videos", Sampling(1))
        refused(paths[1], "a file of more than 0 GiB")
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MAX_PIXELS", 48 * 31)
        patch.setitem(videos.CODEC, "max_pixels", str(48 * 31))
        refused(paths[0], "not a video that can be decoded: ")
        refused(paths[1], "48 x 32 pixels: more than 1488")


def test_without_ffmpeg_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^videos: PyAV is not installed: pip install diversedit_jax\[video\]$"):
        videos.open_videos(tmp_path)
    moving_picture(tmp_path / "p" / "a.webp", frames(0, 2))
    folder_of_frames(tmp_path / "p" / "b", frames(1, 2))
    found = videos.open_videos(tmp_path / "p")
    for index in range(2):
        np.testing.assert_array_equal(videos.clips(found, index, Sampling(2), SIZE), [middle(frames(index, 2))])


def test_what_is_no_collection_is_named(tmp_path):
    for path, words, options in [
        (tmp_path / "nowhere", "videos: .*nowhere does not exist", {}),
        ("gs://bucket/videos", "videos: gs://bucket/videos is not a path of this machine", {}),
        (tmp_path, "holds no videos, but nothing else", {}),
        (tmp_path, "videos: kind = 'zip' is unknown; known: folder, tar", {"kind": "zip"}),
    ]:
        with pytest.raises((DataError, ConfigError), match=words):
            videos.open_videos(path, **options)
    Image.fromarray(frames(0)[0]).save(tmp_path / "0.png")
    (tmp_path / "labels.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"holds no videos, but 1 x \*.json; 1 x \*.png|but 1 x \*.png; 1 x \*.json"):
        videos.open_videos(tmp_path)
    with pytest.raises(DataError, match=r"0.png is neither a folder nor a .tar file"):
        videos.open_videos(tmp_path / "0.png")
    for sampling, words in [
        (Sampling(-1), "--frames = -1: must be at least 1"),
        (Sampling(1, 0), "--interval = 0: must be at least 1"),
        (Sampling(1, 1, "last"), "--windows = 'last' is unknown"),
    ]:
        with pytest.raises(ConfigError, match=words):
            sampling.check()

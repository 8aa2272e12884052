"""Latents whose conditions are captions: token ids as our tool stores them, and text features as U-ViT does."""

import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest

from diversedit_jax import data
from diversedit_jax.api import Conditions
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.runtime.files import write_json
from tests.data.test_foreign_latents import npy, png, stacked
from tests.data.test_image_collections import encoded
from tools import latent_shards

VOCABULARY, LENGTH, START, END = 20, 5, 18, 19
SAID = {"sha256": "ab", "vocabulary": VOCABULARY, "length": LENGTH, "start": START, "end": END}
TEXT = {name: SAID[name] for name in ("sha256", "vocabulary", "length")}
COUNTS = (3, 1, 2)  # captions of the images


def tokens(image: int) -> np.ndarray:
    """Token ids of all captions of an image; each says which one it is."""
    return np.array([[START, image, caption, END, END] for caption in range(COUNTS[image])], np.int32)


def pixels(image: int) -> np.ndarray:
    return np.random.default_rng(image).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def shards(path, ids=tokens, said=SAID):
    """As tools.prepare_latents writes them."""
    about = {"format": 1, "moments": "mean_std", "shape": [4, 6, 2], "classes": None, "image": "png"}
    about |= {"vae": {"name": "vae", "sha256": "0" * 64, "scale": 0.18}, "captions": said}
    plan = latent_shards.Plan(about, latent_shards.features((4, 6, 2), 8, "png", {}, (), LENGTH), len(COUNTS), 2)
    latent_shards.claim(path, plan)
    for shard in range(plan.shards):
        records = [
            {
                "moments": np.stack([np.full((4, 6, 4), 1 + i + 100 * mirrored, np.float16) for mirrored in range(2)]),
                "key": str(i),
                "tokens": ids(i),
                "text": [f"image {i}, caption {k}" for k in range(COUNTS[i])],
                "image": encoded(pixels(i)),
            }
            for i in plan.images(shard)
        ]
        latent_shards.write_shard(path, plan, shard, records, {}, {"captions_written": len(records)})
    latent_shards.finish(path, plan)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("captioned") / "set")


def make(path, **options):
    return data.make("latents", "train", data_dir=str(path), **options)


def test_an_example_has_the_ids_of_its_first_caption_and_of_all(written):
    dataset = make(written, image=True)
    assert dataset.text == TEXT
    conditions = dataset.space.conditions
    assert isinstance(conditions, Conditions)
    assert (conditions.classes, conditions.names) == (None, ())
    np.testing.assert_array_equal(conditions.null, np.int32([START, END, END, END, END]))
    assert conditions.null.dtype == np.int32
    assert dataset.scale == 0.18
    for image in range(len(COUNTS)):
        example = dataset.source[image]
        np.testing.assert_array_equal(example["y"], tokens(image)[0])
        assert example["y"].dtype == np.int32
        assert ("captions" in example) == (COUNTS[image] > 1)
        if COUNTS[image] > 1:
            np.testing.assert_array_equal(example["captions"], tokens(image))
        np.testing.assert_array_equal(example["image"], pixels(image))
        np.testing.assert_array_equal(example["moments"], np.full((4, 6, 4), 1 + image, np.float16))


def test_sets_with_labels_have_no_text():
    assert data.make("synthetic", "train").text is None


@pytest.mark.parametrize("mirror", [False, True])
def test_every_caption_is_drawn_equally_often_and_the_others_are_gone(mirror, written):
    dataset = make(written, mirror=mirror)
    transform = pickle.loads(pickle.dumps(dataset.transform))
    seen = Counter()
    for position in range(1200):
        example = transform(dataset.source[0], pipeline.generator(0, position))
        assert example.keys() == {"moments", "y"}
        assert example["moments"].shape == (4, 6, 4)
        seen[int(example["moments"][0, 0, 0] >= 100), int(example["y"][2])] += 1
    assert seen.keys() == {(mirrored, caption) for mirrored in range(1 + mirror) for caption in range(3)}
    expected = 1200 / len(seen)
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 20  # chi squared: p = 0.001 at 5
    single = transform(dataset.source[1], pipeline.generator(0, 0))
    np.testing.assert_array_equal(single["y"], tokens(1)[0])


def test_batches_hold_one_caption_of_each_and_repeat_for_a_seed(written):
    dataset = make(written)
    first, again = (
        [next(batches)["y"] for _ in range(3)]
        for batches in (pipeline.batches(dataset, 6, 0, num_threads=0, timeout=0.0) for _ in range(2))
    )
    np.testing.assert_array_equal(first, again)
    assert np.shape(first) == (3, 6, LENGTH)
    assert len({tuple(row[:3]) for batch in first for row in batch.tolist()}) > len(COUNTS)


def test_ids_beyond_the_vocabulary_are_refused_with_their_record(tmp_path):
    path = shards(tmp_path / "set", lambda i: tokens(i) + (i == 2))
    dataset = make(path)
    dataset.source[1]
    with pytest.raises(DataError, match=r"record 2 \(.*00001-of-00002, number 0\): token ids 1 .. 20 are not in"):
        dataset.source[2]
    with pytest.raises(DataError, match=r"00001-of-00002, record 0: token ids 1 .. 20 are not in 0 .. 19"):
        list(latent_shards.verify(path))


def test_verification_finds_captions_that_are_none(written, tmp_path):
    assert list(latent_shards.verify(written)) == [2, 1]
    for number, (ids, words) in enumerate(
        [
            (
                lambda i: tokens(i)[: 3 - i],
                r"00001-of-00002, record 0: 5 token ids, wanted 5 for each of 2",
            ),
            (lambda i: tokens(i)[:, ::-1].copy(), r"record 0: caption 0 does not begin and end as tokens do"),
        ]
    ):
        with pytest.raises(DataError, match=words):
            list(latent_shards.verify(shards(tmp_path / str(number), ids)))


def test_an_image_without_captions_is_refused(tmp_path):
    path = shards(tmp_path / "set", lambda i: tokens(i)[: 2 * i])
    with pytest.raises(DataError, match=r"record 0 .*: it has no captions"):
        make(path).source[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"captions": None}, "has captions, but no latents.json that says which tokenizer made them"),
        ({"captions": {}}, "cannot be used: KeyError: 'sha256'"),
        ({"captions": SAID | {"vocabulary": True}}, "captions have vocabulary = True"),
        ({"captions": SAID | {"length": 2**62}}, "captions have length = 4611686018427387904"),
        ({"captions": SAID | {"end": 20}}, r"token ids 18 .. 20 are not in 0 .. 19"),
        ({"captions": SAID | {"length": 6}}, r"tokens has shape \(None, 5\), wanted \(any, 6\)"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(change, words, written, tmp_path):
    shutil.copytree(written, tmp_path / "set")
    about = json.loads((written / "latents.json").read_text())
    write_json(tmp_path / "set" / "latents.json", about | change)
    with pytest.raises(DataError, match=words):
        make(tmp_path / "set")


def test_classes_of_captions_are_refused(written):
    with pytest.raises(ConfigError, match=r"num_classes = 1000, but .* has captions instead of classes"):
        make(written, num_classes=1000)


# U-ViT's layout.
N, WIDTH = 7, 3


def features(image, caption):
    return np.random.default_rng([image, caption]).standard_normal((N, WIDTH), np.float32)


EMPTY = features(99, 99)


def uvit(path, kind="logvar", above=True):
    folder = path / "train"
    folder.mkdir(parents=True)
    for image, count in enumerate(COUNTS):
        (folder / f"{10 * image}.npy").write_bytes(npy(stacked(image, kind)))
        (folder / f"{10 * image}.png").write_bytes(png(image))
        for caption in range(count):
            (folder / f"{10 * image}_{caption}.npy").write_bytes(npy(features(image, caption)))
    ((path if above else folder) / "empty_context.npy").write_bytes(npy(EMPTY))
    return path


def opened(path, **options):
    return data.make("uvit", "train", **{"data_dir": str(path), "kind": "logvar"} | options)


@pytest.mark.parametrize("kind", ["logvar", "std"])
@pytest.mark.parametrize("above", [True, False])
def test_uvit_folders_are_read_where_they_lie(kind, above, tmp_path):
    dataset = opened(uvit(tmp_path / "set", kind, above), kind=kind, image=True)
    assert (dataset.scale, dataset.text, dataset.space.conditions.classes) == (0.18215, None, None)
    assert dataset.space.shape == (3, 6, 4)
    np.testing.assert_array_equal(dataset.space.conditions.null["context"], EMPTY)
    for image in range(len(COUNTS)):
        example = pickle.loads(pickle.dumps(dataset.source))[image]
        mean, std = np.split(stacked(image), 2)
        wanted = np.moveaxis(np.concatenate([mean, std]), 0, -1)
        np.testing.assert_allclose(example["moments"], wanted, rtol=1e-5)
        np.testing.assert_array_equal(example["y"]["context"], features(image, 0))
        assert example["image"].dtype == np.uint8
    assert opened(tmp_path / "set", kind=kind, scale=0.2301).scale == 0.2301
    assert "image" not in opened(tmp_path / "set", kind=kind).source[0]


def test_a_visit_reads_the_files_of_at_most_two_captions(tmp_path, monkeypatch):
    dataset = opened(uvit(tmp_path / "set"))
    read, names = data.uvit.content, []
    monkeypatch.setattr(data.uvit, "content", lambda file: names.append(file.name) or read(file))
    seen = Counter()
    for position in range(600):
        names.clear()
        example = dataset.transform(dataset.source[0], pipeline.generator(0, position))
        assert example.keys() == {"moments", "y"}
        assert len(names) <= 3, names  # the latent too
        seen[next(k for k in range(3) if np.array_equal(example["y"]["context"], features(0, k)))] += 1
    assert min(seen.values()) > 150, seen
    batch = next(pipeline.batches(dataset, 6, 0, num_threads=0, timeout=0.0))
    assert batch["y"]["context"].shape == (6, N, WIDTH)


def test_the_kind_of_uvit_folders_is_never_guessed(tmp_path):
    uvit(tmp_path / "set")
    words = "set kind = 'logvar' for files of U-ViT, REPA and HASTE; 'std' for those of Self-Transcendence"
    with pytest.raises(ConfigError, match=words):
        opened(tmp_path / "set", kind=None)
    with pytest.raises(DataError, match=r"record 0: a standard deviation of -.*: are these log variances\?"):
        opened(tmp_path / "set", kind="std")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("empty_context.npy", None, "neither .*train nor the folder above has empty_context.npy"),
        ("empty_context.npy", npy(EMPTY[0]), r"empty_context.npy has shape \[3\], wanted \[n d\]"),
        ("train/10_0.npy", None, r"10.npy has no caption 10_0.npy; is the copy complete\?"),
        ("train/10.npy", None, r"captions of 10.npy, which is missing"),
        ("train/0_0.npy", npy(EMPTY[:3]), r"0_0.npy has shape \[3, 3\], wanted \[7, 3\]"),
        ("train/0_0.npy", npy(EMPTY)[:-4], r"0_0.npy: it is truncated"),
        ("train/0_0.npy", npy(EMPTY * np.float32(np.nan)), "0_0.npy has text features that are not finite"),
        ("train/0_0.npy", npy(np.zeros((N, WIDTH), np.int64)), "0_0.npy: its numbers are int64, wanted float32"),
        ("train/0.npy", b"", "record 0: .*/0.npy: no header of an array"),
    ],
)
def test_uvit_folders_that_are_not_whole_are_refused(file, content, words, tmp_path):
    path = uvit(tmp_path / "set") / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        opened(tmp_path / "set")


def test_another_damaged_caption_is_named_when_it_is_drawn(tmp_path):
    dataset = opened(uvit(tmp_path / "set"))
    (tmp_path / "set/train/20_1.npy").write_bytes(b"")
    example = dataset.source[2]
    second = next(seed for seed in range(20) if np.random.default_rng(seed).integers(2) == 1)
    with pytest.raises(DataError, match=r"20_1.npy: no header of an array"):
        dataset.transform(example, np.random.default_rng(second))


def test_a_folder_without_latents_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no latents 0.npy"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="no split 'val'"):
        data.make("uvit", "val", data_dir=str(tmp_path), kind="std")

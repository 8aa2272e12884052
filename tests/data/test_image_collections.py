"""Collections of images: every layout gives the same items in the same order, and nothing is lost silently."""

import io
import json
import os
import pickle
import resource
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from diversedit_jax import data
from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import image_collections
from diversedit_jax.errors import ConfigError, DataError, MachineError

CLASSES = ("ant", "bee", "cow")


def picture(number: int, size=(20, 14)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind="PNG", mode=None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


# name below the top -> number of its picture; the classes are the folders
ITEMS = {"ant/a.png": 0, "ant/deep/b.PNG": 1, "bee/a.png": 2, "cow/c.png": 3, "cow/d.png": 4}
LABELS = [0, 0, 1, 2, 2]


def folder(path):
    for name, number in reversed(ITEMS.items()):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(number)))
    return path


def tar(path, label="cls", items=ITEMS):
    path.mkdir(exist_ok=True)
    for part, rows in (("0001", [3, 4]), ("0000", [0, 1, 2])):
        with tarfile.open(path / f"train-{part}.tar", "w") as file:
            for row in rows:
                add(file, f"x/{row:04d}.png", encoded(picture(row)))
                text = str(LABELS[row]) if label == "cls" else json.dumps({"label": LABELS[row], "w": 20})
                add(file, f"x/{row:04d}.{label}", text.encode())
    return path


def add(file, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    file.addfile(info, io.BytesIO(content))


def zipped(path):
    path = path / "set.zip"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for number in (4, 2, 0, 1, 3):
            file.writestr(f"00000/img{number:08d}.png", encoded(picture(number)))
        listed = [[f"00000/img{number:08d}.png", LABELS[number]] for number in range(5)]
        file.writestr("dataset.json", json.dumps({"labels": listed}))
    return path


def imagenet(path):
    """As tfds keeps imagenet2012."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
            "file_name": tfds.features.Text(),
        }
    )
    path.mkdir()
    writer = ArrayRecordWriter(str(path / "imagenet2012-train.array_record-00000-of-00001"), "group_size:1")
    for name, number in ITEMS.items():
        example = {"image": encoded(picture(number)), "label": LABELS[number], "file_name": name}
        writer.write(features.serialize_example(example))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=str(path), dataset_name="imagenet2012", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=[5], num_bytes=1, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=str(path), features=features, split_infos=[split], check_data=False)
    return path


@pytest.mark.parametrize("make", [folder, tar, zipped, imagenet])
def test_every_layout_gives_the_same_items(make, tmp_path):
    images = image_collections.open_images(make(tmp_path / "images"))
    assert images.kind == {folder: "folder", tar: "tar", zipped: "zip", imagenet: "tfds"}[make]
    assert len(set(images.keys)) == len(images) == 5
    assert images.labels.tolist() == LABELS
    assert images.classes == (CLASSES if make in (folder, imagenet) else ("0", "1", "2"))
    sent = pickle.loads(pickle.dumps(images))
    with ThreadPoolExecutor(4) as pool:
        for found in (map(images.read, range(5)), pool.map(sent.read, range(5))):
            for number, content in enumerate(found):
                np.testing.assert_array_equal(np.asarray(image_collections.decode(content)), picture(number))
    plain = image_collections.open_images(make(tmp_path / "again"), images.kind, unconditional=True)
    assert (plain.classes, plain.labels.tolist()) == ((), [0] * 5)


def test_labels_may_be_json(tmp_path):
    assert image_collections.open_images(tar(tmp_path, "json")).labels.tolist() == LABELS


def test_images_without_folders_have_no_classes(tmp_path):
    for name in ("b.png", "a.jpg"):
        (tmp_path / name).write_bytes(encoded(picture(0)))
    images = image_collections.open_images(tmp_path)
    assert (images.keys, images.classes, images.labels.tolist()) == (["a.jpg", "b.png"], (), [0, 0])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.png").write_bytes(encoded(picture(0)))
    with pytest.raises(DataError, match=r"has images in folders \(more\) and beside them \(a.jpg\)"):
        image_collections.open_images(tmp_path)


def test_the_subfolder_of_a_split_is_taken(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "val")
    images = image_collections.open_images(tmp_path)
    assert str(images) == f"5 images, 3 classes: {tmp_path / 'train'}"
    assert image_collections.open_images(tmp_path, split="val").classes == CLASSES
    with pytest.raises(DataError, match=r"has no split 'test'; its folders: train, val"):
        image_collections.open_images(tmp_path, split="test")


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_class_may_be_named_like_a_split(name, tmp_path):
    """VOC, COCO and CIFAR-100 have the class `train`."""
    os.rename(folder(tmp_path) / CLASSES[0], tmp_path / name)
    images = image_collections.open_images(tmp_path)
    assert sorted(images.classes) == sorted({name, *CLASSES[1:]})
    assert len(images) == 5
    assert len(image_collections.open_images(tmp_path, split=name, unconditional=True)) == 2, "asked for"
    pixels = data.make("images", "train", data_dir=str(tmp_path), size=8)
    assert pixels.space.conditions == Conditions.labels(3, images.classes)


def test_splits_of_which_none_is_named_train_are_no_classes(tmp_path):
    folder(tmp_path / "train2017")
    folder(tmp_path / "val2017")
    with pytest.raises(DataError, match=r"folders that look like splits, and none named train: train2017, val2017"):
        image_collections.open_images(tmp_path)
    assert image_collections.open_images(tmp_path, split="train2017").classes == CLASSES


def test_images_that_are_held_out_are_no_training_images(tmp_path):
    folder(tmp_path)
    with pytest.raises(DataError, match="has no split 'test'"):
        data.make("images", "test", data_dir=str(tmp_path))


def test_what_is_no_image_is_counted(tmp_path):
    folder(tmp_path)
    (tmp_path / "ant" / "readme.txt").write_text("")
    (tmp_path / "ant" / "Thumbs.db").write_text("")
    (tmp_path / "bee" / ".DS_Store").write_text("")
    os.symlink(tmp_path, tmp_path / "cow" / "loop")
    images = image_collections.open_images(tmp_path)
    assert len(images) == 5
    assert images.ignored == {"*.txt": 1, "*.db": 1, "hidden file or folder": 1, "link to a folder above": 1}


def test_the_labels_of_a_folder_may_be_listed(tmp_path):
    """As REPA's and EDM's tools write them: the folders hold a thousand images each, and are no classes."""
    listed = [[name, 2 * label] for name, label in zip(ITEMS, LABELS, strict=True)]
    (folder(tmp_path) / "dataset.json").write_text(json.dumps({"labels": [*listed, ["gone.png", 1]]}))
    images = image_collections.open_images(tmp_path)
    assert images.labels.tolist() == [2 * label for label in LABELS]
    assert images.classes == tuple("01234")
    assert images.ignored == {"label without an image": 1}
    for content, classes in [({"labels": None}, ()), ({"about": "ants"}, CLASSES)]:
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        assert image_collections.open_images(tmp_path).classes == classes
    for content, words in [({"labels": listed[1:]}, "ant/a.png in .* has no label"), ({"labels": 3}, "cannot be read")]:
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=words):
            image_collections.open_images(tmp_path)
        assert image_collections.open_images(tmp_path, unconditional=True).classes == ()


def test_labels_that_are_listed_a_folder_deeper_are_not_missed(tmp_path):
    (folder(tmp_path / "set") / "dataset.json").write_text(json.dumps({"labels": None}))
    with pytest.raises(DataError, match=rf"set/dataset.json lists labels: give {tmp_path}/set, or set unconditional"):
        image_collections.open_images(tmp_path)


@pytest.mark.parametrize("top", ["", "set/"])
def test_a_zip_has_class_folders_or_lists_labels(top, tmp_path):
    members = [(top + name, encoded(picture(number))) for number, name in enumerate(ITEMS)]
    images = image_collections.open_images(archive(tmp_path / "folders.zip", "zip", members))
    assert (images.classes, images.labels.tolist()) == (CLASSES, LABELS)
    listed = json.dumps({"labels": list(zip(ITEMS, LABELS, strict=True))})
    listing = archive(tmp_path / "listed.zip", "zip", [*members, (f"{top}dataset.json", listed)])
    images = image_collections.open_images(listing)
    assert (images.classes, images.labels.tolist()) == (("0", "1", "2"), LABELS)
    assert not images.ignored
    twice = archive(tmp_path / "twice.zip", "zip", [*members, ("a/dataset.json", listed), ("b/dataset.json", listed)])
    with pytest.raises(DataError, match=r"holds several dataset.json: a/dataset.json, b/dataset.json"):
        image_collections.open_images(twice)


def test_unconditional_images_may_lie_anywhere(tmp_path):
    (folder(tmp_path) / "z.png").write_bytes(encoded(picture(0)))
    images = image_collections.open_images(tmp_path, unconditional=True)
    assert (images.keys, images.classes) == ([*ITEMS, "z.png"], ())


def test_odd_files_are_neither_lost_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere", tmp_path / "dangling.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(picture(3)))
    images = image_collections.open_images(tmp_path)
    assert images.ignored == {"pipe or device": 1}
    assert images.keys == ["caf\\udce9.png", "dangling.png"]
    np.testing.assert_array_equal(np.asarray(image_collections.decode(images.read(0))), picture(3))
    with pytest.raises(DataError, match=r"dangling.png: cannot be read: No such file"):
        image_collections.crop(images, 1, 8)


def archive(path, kind, members):
    """A tar or zip with these members, some of them of one name."""
    if kind == "tar":
        with tarfile.open(path, "w") as file:
            for name, content in members:
                add(file, name, content)
    else:
        with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, content in members:
                file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("kind", "members", "words"),
    [
        ("tar", ["a.jpg", "a.png"], r"a has several images: .jpg, .png"),
        ("tar", ["a.left.png", "a.right.png"], r"a has several images: .left.png, .right.png"),
        ("tar", ["a.png", "a.png"], "two images of the name a.png"),
        ("tar", ["a.png", "a.cls"], "a.cls is not a label: invalid literal"),
        ("zip", ["a.png", "a.png"], "two entries a.png"),
    ],
)
def test_of_images_of_one_name_none_is_lost(kind, members, words, tmp_path):
    file = archive(tmp_path / f"set.{kind}", kind, [(name, b"x") for name in members])
    with pytest.raises(DataError, match=words) as error:
        image_collections.open_images(file)
    assert "\n" not in str(error.value)


def test_what_lies_in_archives_beside_images_is_counted(tmp_path):
    members = [("a.png", encoded(picture(0))), ("a.cls", b"1"), ("a.mask.png", b"x"), ("._a.png", b"x")]
    file = archive(tmp_path / "set.tar", "tar", members)
    with tarfile.open(file, "a") as opened:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        opened.addfile(link)
    images = image_collections.open_images(file)
    assert (images.keys, images.labels.tolist()) == (["set.tar/a"], [1])
    np.testing.assert_array_equal(np.asarray(image_collections.decode(images.read(0))), picture(0))
    assert images.ignored == {"*.mask.png": 1, "hidden file or folder": 1, "link or device": 1}
    (tmp_path / "deep").mkdir()
    beside = image_collections.open_images(tmp_path).ignored
    assert beside == images.ignored | {"folder beside the .tar files": 1}
    listed = json.dumps({"labels": [["a.png", 1], ["b.png", 0]]})
    members = [("a.png", b"x"), ("__MACOSX/._a.png", b"x"), (".b.png", b"x"), ("dataset.json", listed)]
    zipped = image_collections.open_images(archive(tmp_path / "set.zip", "zip", members))
    assert (zipped.keys, zipped.labels.tolist()) == (["a.png"], [1])
    assert zipped.ignored == {"hidden file or folder": 2, "label without an image": 1}


def test_what_is_no_collection_is_named(tmp_path):
    def refused(path, words, error_kind=DataError, **options):
        with pytest.raises(error_kind, match=words) as error:
            image_collections.open_images(path, **options)
        assert "\n" not in str(error.value)

    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, r"holds no images, but 1 x \*.txt")
    refused(tmp_path / "notes.txt", "is neither a folder nor a .tar or .zip file")
    refused(tmp_path / "nowhere", "does not exist")
    refused("gs://bucket/images", "gs://bucket/images is not a path of this machine: mount the bucket", ConfigError)
    refused(tmp_path, "kind = 'lmdb' is unknown; known: folder, tar, zip, tfds", ConfigError, kind="lmdb")
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4")
    refused(tmp_path / "bad.zip", "bad.zip cannot be read: ValueError: a truncated or damaged zip archive")
    whole = tar(tmp_path / "tars") / "train-0000.tar"
    content = whole.read_bytes()
    for size in (2000, 1536, 700, len(content.rstrip(b"\0"))):
        whole.write_bytes(content[:size])
        refused(tmp_path / "tars", r"train-0000.tar cannot be read: (it is truncated|unexpected end of data)")
    with tarfile.open(whole, "w") as file:
        add(file, "0009.png", b"")
    refused(tmp_path / "tars", r"train-0000.tar/0009 in .* has no label, but others have")
    listed = {"labels": [["a.png", 0]]}
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as file:
        for name, content in (("a.png", b""), ("b.png", b""), ("dataset.json", json.dumps(listed))):
            file.writestr(name, content)
    refused(tmp_path / "part.zip", "b.png in .* has no label, but others have")
    refused(imagenet(tmp_path / "tfds"), "cannot open split 'val'", split="val")


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (encoded(picture(0)), 0),
        (encoded(picture(0), "JPEG", quality=100, subsampling=0), 6),
        (encoded(picture(0), "JPEG", "CMYK", quality=100), 60),  # no profile: a plain conversion
        (encoded(np.dstack([picture(0), np.full((14, 20), 9, np.uint8)])), 0),  # transparency is dropped
        (encoded(picture(0), "WEBP", lossless=True), 0),
    ],
    ids=["png", "jpeg", "cmyk", "alpha", "webp"],
)
def test_images_of_every_kind_become_rgb(content, tolerance):
    image = image_collections.decode(content)
    assert (image.mode, image.size) == ("RGB", (20, 14))
    error = np.abs(np.asarray(image).astype(int) - picture(0))
    assert error.mean() <= tolerance / 3
    assert tolerance or not error.any()


def test_grey_palette_and_deep_images_become_rgb():
    grey = picture(0)[..., 0]
    wanted = np.repeat(grey[..., None], 3, axis=-1)
    deep = grey.astype(np.uint16) * 256 + 17
    for content in (encoded(grey), encoded(grey, mode="P"), encoded(deep)):
        np.testing.assert_array_equal(np.asarray(image_collections.decode(content)), wanted)


def test_what_cannot_be_decoded_is_an_error(monkeypatch):
    jpeg = encoded(picture(0, (64, 64)), "JPEG")
    for content, words in [
        (b"", "an empty file"),
        (b"GIF? no", "not an image that can be decoded"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (b"<html>404</html>", "not an image"),
    ]:
        with pytest.raises(DataError, match=words) as error:
            image_collections.decode(content)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(image_collections, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="20 x 14 pixels: more than 100"):
        image_collections.decode(encoded(picture(0)))


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    images = image_collections.open_images(folder(tmp_path))
    (tmp_path / "bee" / "a.png").unlink()  # between the listing and the reading
    with pytest.raises(DataError, match=r"^bee/a.png: cannot be read: .*No such file"):
        image_collections.crop(images, 2, 8)


def test_a_disk_that_goes_is_no_fault_of_an_image(tmp_path, monkeypatch):
    images = image_collections.open_images(folder(tmp_path / "mount" / "images"))
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        image_collections.crop(images, 2, 8)
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    assert image_collections.crop(images, 2, 8).shape == (8, 8, 3)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MachineError, match=r"lacks memory, threads or open files: MemoryError$"):
        image_collections.crop(images, 2, 8)


def adm(image: Image.Image, size: int) -> np.ndarray:
    """ADM's rule, written down once more in other words."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    if width < height:
        width, height = size, round(height * (size / width))
    else:
        width, height = round(width * (size / height)), size
    array = np.array(image.resize((width, height), resample=Image.BICUBIC))
    return array[(height - size) // 2 :, (width - size) // 2 :][:size, :size]


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (np.arange(256, dtype=np.int32), "TIFF", "32-bit integers of unknown range: wanted 8 or 16 bits"),
        (np.linspace(0, 1, 256, dtype=np.float32), "TIFF", "floating-point numbers of unknown range"),
        (np.arange(256, dtype=np.uint16), "PNG", "values have 16 bits, the largest is 255 of 65535: stored as 8 bits?"),
        (np.arange(256, dtype=np.uint16), "TIFF", "values have 16 bits, the largest is 255 of 65535"),
    ],
)
def test_values_of_unknown_range_do_not_become_black(values, kind, words):
    with pytest.raises(DataError, match=words):
        image_collections.decode(encoded(values.reshape(16, 16), kind))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_their_upper_byte(kind):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 17
    found = np.asarray(image_collections.decode(encoded(values, kind)))
    np.testing.assert_array_equal(found, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    assert not np.asarray(image_collections.decode(encoded(0 * values, kind))).any(), "black is black"


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (90_000, 2)])
def test_only_the_middle_of_a_long_image_is_enlarged(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = image_collections.center_crop(image, 256)
    assert crop.shape == (256, 256, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21, "KiB: it took 15.8 GB"


@pytest.mark.parametrize("size", [(33, 47), (101, 64), (200, 31), (15, 9), (64, 512)])
def test_the_middle_alone_is_the_middle_of_the_whole(size, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    whole = image_collections.center_crop(image, 16)
    monkeypatch.setattr(image_collections, "MAX_PIXELS", 0)
    alone = image_collections.center_crop(image, 16)
    assert np.abs(alone.astype(int) - whole).max() <= 1, "another rounding"


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (47, 33), (101, 64), (64, 63), (15, 9), (200, 31)])
def test_crops_are_those_of_adm(size):
    image = Image.fromarray(picture(1, size))
    np.testing.assert_array_equal(image_collections.center_crop(image, 16), adm(image, 16))


def test_pixels_of_a_folder_are_a_data_set(tmp_path):
    dataset = data.make("images", "train", data_dir=str(folder(tmp_path)), size=8, mirror=True)
    assert (dataset.space, len(dataset.source)) == (Space((8, 8, 3), Conditions.labels(3, CLASSES)), 5)
    example = dataset.source[2]
    wanted = adm(Image.fromarray(picture(2)), 8) / 127.5 - 1
    np.testing.assert_allclose(example["x"], wanted, atol=1e-6)
    assert (example["y"], example["x"].dtype) == (1, np.float32)
    drawn = [dataset.transform(example, np.random.default_rng(i))["x"] for i in range(40)]
    mirrored = [np.array_equal(x, example["x"][:, ::-1]) for x in drawn]
    assert all(m or np.array_equal(x, example["x"]) for m, x in zip(mirrored, drawn, strict=True))
    assert 8 < sum(mirrored) < 32
    (tmp_path / "cow" / "c.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cow/c.png: an empty file"):
        dataset.source[3]
    plain = data.make("images", "train", data_dir=str(tmp_path), size=8, unconditional=True)
    assert (plain.space.conditions, plain.transform) == (Conditions.labels(0), None)


@pytest.mark.parametrize("damage", ["changed", "cut in the content", "cut in the header"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_that_is_damaged_while_it_is_read_is_named(method, damage, tmp_path):
    """Its directory is read once, so later damage shows at a member."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a.png", encoded(picture(0)))
        file.writestr("b.png", encoded(picture(1)))
    images = image_collections.open_images(path)
    assert images.read(0) == encoded(picture(0))
    content = bytearray(path.read_bytes())
    begin = content.index(b"PK\3\4", 1)  # of b.png
    if damage == "changed":
        content[begin + 60] ^= 0xFF
    path.write_bytes(
        content[: {"changed": None, "cut in the content": begin + 60, "cut in the header": begin + 20}[damage]]
    )
    with pytest.raises(DataError, match=r"b.png: damaged in the zip: \w+"):
        images.read(1)


def test_a_zip_is_stored_or_deflated(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a.png", encoded(picture(0)))
    images = image_collections.open_images(tmp_path / "set.zip")
    with pytest.raises(DataError, match=r"a.png: compressed by method 12: wanted none, or deflate"):
        images.read(0)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_only_images_are_decoded(tmp_path):
    """Pillow starts Ghostscript to decode EPS. The content says what a file is, not its name."""
    with pytest.raises(DataError, match="cannot identify image file"):
        image_collections.decode(EPS)
    folder(tmp_path)
    (tmp_path / "bee/a.png").write_bytes(EPS)
    images = image_collections.open_images(tmp_path)
    with pytest.raises(DataError, match=r"bee/a.png: not an image that can be decoded: cannot identify"):
        image_collections.crop(images, 2, 8)


def test_no_flipped_bit_of_a_png_is_read():
    """Of an image that compresses well, Pillow has all pixels before it meets a checksum."""
    smooth = np.add.outer(np.arange(0, 256, 4), np.arange(64)).astype(np.uint8)[..., None].repeat(3, axis=2)
    whole = encoded(smooth)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        try:
            np.testing.assert_array_equal(np.asarray(image_collections.decode(bytes(damaged))), smooth)
        except DataError:
            continue


@pytest.mark.parametrize("label", [200_000_000, 2**40, -1, 1.5, True, None, "three", [1]])
def test_a_label_that_is_none_is_refused(label, tmp_path):
    """A large one would take gigabytes: as many names of classes, and as many rows of the network's table."""
    folder(tmp_path / "folder")
    (tmp_path / "folder" / "dataset.json").write_text(json.dumps({"labels": [[name, label] for name in ITEMS]}))
    files = {"a.png": encoded(picture(0)), "a.json": json.dumps({"label": [label]}).encode()}
    archive(tmp_path / "set.tar", "tar", files.items())
    files = {"a.png": files["a.png"], "a.cls": str(label).encode()}
    archive(tmp_path / "cls.tar", "tar", files.items())
    for name in ("folder", "set.tar", "cls.tar"):
        with pytest.raises(DataError, match=r"cannot be read: ") as error:
            image_collections.open_images(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_tar_that_goes_in_circles_is_refused(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as file:
        add(file, "a.png", encoded(picture(0)))
        add(file, "b.png", encoded(picture(1)))
    content = bytearray((tmp_path / "set.tar").read_bytes())
    content[124:136] = (256**12 - 512).to_bytes(12, "big")  # a size of -512
    total = sum(content[:148]) + 256 + sum(content[156:512])
    content[148:156] = b"%06o\0 " % total
    (tmp_path / "set.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"set.tar.* (negative size|invalid offset)"):  # our words, or Python 3.14's
        image_collections.open_images(tmp_path / "set.tar")


def test_a_damaged_name_in_a_zip_costs_neither_labels_nor_images(tmp_path):
    path = zipped(tmp_path / "set")
    whole = path.read_bytes()
    for name in (b"dataset.json", b"img00000003.png"):
        damaged = bytearray(whole)
        damaged[whole.rindex(name) + len(name) - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no header of entry"):
            image_collections.open_images(path)


@pytest.mark.parametrize("kind", ["dataset.json", "set.tar", "set.zip"])
def test_a_pipe_is_refused(kind, tmp_path):
    """Opening one would wait until somebody writes."""
    folder(tmp_path)
    os.mkfifo(tmp_path / kind)
    with pytest.raises(DataError, match="is not a regular file"):
        image_collections.open_images(tmp_path if kind == "dataset.json" else tmp_path / kind)


def test_a_module_that_a_data_set_names_is_not_imported(tmp_path, monkeypatch):
    path = imagenet(tmp_path / "set")
    (tmp_path / "planted.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(tmp_path)
    features = (path / "features.json").read_text()
    (path / "features.json").write_text(
        features.replace("tensorflow_datasets.core.features.image_feature.Image", "planted.Image")
    )
    with pytest.raises(DataError, match=r"features.json asks for 'planted.Image': only the features of tfds are read"):
        image_collections.open_images(path)


def lanczos(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resize one axis by Lanczos' window of 3 lobes, widened for smaller images, in float64."""
    count = pixels.shape[axis]
    scale = max(count / size, 1)
    center = (np.arange(size)[:, None] + 0.5) * count / size
    x = (np.arange(count) + 0.5 - center) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)


@pytest.mark.parametrize(
    ("size", "left", "top"),
    [((21, 14), 3, 0), ((14, 23), 0, 4), ((60, 61), 0, 0), ((5, 8), 0, 1)],
)
def test_lanczos_crops_a_square_first(size, left, top):
    image = Image.fromarray(picture(5, (7, 7)) // 2 + 64)  # far from 0 and 255, where Pillow would clip after each axis
    image = image.resize(size, Image.Resampling.BICUBIC)
    side = min(size)
    square = np.asarray(image)[top : top + side, left : left + side].astype(np.float64)
    found = image_collections.lanczos_crop(image, 8)
    assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8)
    # Pillow rounds twice: by up to 0.5, which the second axis may enlarge by a third, and by 0.5.
    np.testing.assert_allclose(found, lanczos(lanczos(square, 8, 0), 8, 1), atol=1.25)
    assert not np.array_equal(found, image_collections.center_crop(image, 8))

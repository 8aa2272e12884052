"""Captions of images: every published layout gives the same items, and a bad caption is named, never taken for good."""

import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from diversedit_jax.data import image_collections
from diversedit_jax.data.captions import open_captioned
from diversedit_jax.errors import DataError
from tests.data.test_image_collections import add, encoded, picture

# COCO: file name -> (id of the image, its captions with their ids). Neither is in the order of the names.
COCO = {
    "COCO_train2014_000000000009.png": (9, [(40, "nine"), (7, "a first nine")]),
    "COCO_train2014_000000000030.png": (3, [(8, "three, on the left")]),
    "COCO_train2014_000000000011.png": (11, [(2, "eleven 🐱"), (3, "11"), (1, "elf")]),
}
WANTED = {
    "COCO_train2014_000000000030.png": ("three, on the left",),
    "COCO_train2014_000000000009.png": ("a first nine", "nine"),
    "COCO_train2014_000000000011.png": ("elf", "eleven 🐱", "11"),
}
# The other layouts: name of an image without its ending -> captions.
ITEMS = {"a": ("one cat", "a cat, on a mat"), "b": ('a "dog"',), "c": ("ein Büffel 🦬", "x")}


def pictures(path, names):
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(picture(number)))
    return path


def annotated(items=COCO, **more):
    images = [{"file_name": name, "id": number, "height": 14} for name, (number, _) in items.items()]
    found = [
        {"image_id": number, "id": one, "caption": text} for number, texts in items.values() for one, text in texts
    ]
    return {"info": {}, "images": images, "annotations": found} | more


def coco(path, split="train2014", content=None):
    pictures(path / split, COCO)
    (path / "annotations").mkdir(exist_ok=True)
    text = json.dumps(annotated() if content is None else content)
    (path / "annotations" / f"captions_{split}.json").write_text(text)
    return path


def table(path, name="captions.csv", header="filepath,caption", tab=","):
    """Rows in another order than the names, with quotes and commas."""
    pictures(path, [f"{key}.png" for key in ITEMS])
    rows = [(f"{key}.png", text) for key, texts in reversed(ITEMS.items()) for text in texts]
    lines = [header, *(f'{key}{tab}"{text.replace(chr(34), chr(34) * 2)}"' for key, text in rows)]
    (path / name).write_text("\n".join(lines) + "\n")
    return path


def jsonl(path, one="text"):
    pictures(path, [f"{key}.png" for key in ITEMS])
    rows = [{"file_name": f"{key}.png", one: texts if len(texts) > 1 else texts[0]} for key, texts in ITEMS.items()]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    return path


def tar(path):
    path.mkdir(exist_ok=True)
    for part, keys in (("0001", "c"), ("0000", "ab")):
        with tarfile.open(path / f"{part}.tar", "w") as file:
            for key in keys:
                add(file, f"{key}.png", encoded(picture(ord(key) - ord("a"))))
                add(file, f"{key}.json", json.dumps({"caption": ITEMS[key], "w": 20}).encode())
    return path


def beside(path):
    pictures(path, [f"x/{key}.png" for key in ITEMS])
    for key, texts in ITEMS.items():
        (path / "x" / f"{key}.txt").write_text(f"{texts[0]}\n")
    return path


def found(path, **options):
    """image -> captions, and the whole."""
    captioned = open_captioned(path, **options)
    return dict(zip(captioned.images.keys, captioned.texts, strict=True)), captioned


@pytest.mark.parametrize(
    ("make", "key", "count"),
    [
        (table, "{}.png", 2),
        (lambda path: table(path, "metadata.csv", "file_name,text"), "{}.png", 2),
        (
            lambda path: table(path, "metadata.csv", "image\ttitle", "\t"),
            "{}.png",
            2,
        ),
        (jsonl, "{}.png", 2),
        (lambda path: jsonl(path, "prompt"), "{}.png", 2),
        (tar, None, 2),
        (beside, "x/{}.png", 1),
    ],
)
def test_every_layout_gives_the_same_captions(make, key, count, tmp_path):
    texts, captioned = found(make(tmp_path))
    names = ["0000.tar/a", "0000.tar/b", "0001.tar/c"] if key is None else [key.format(name) for name in ITEMS]
    assert texts == {name: text[:count] for name, text in zip(names, ITEMS.values(), strict=True)}
    assert list(texts) == names
    assert (captioned.missing, captioned.left_out, captioned.images.ignored) == ({}, {}, {})
    sent = pickle.loads(pickle.dumps(captioned.images))
    for number in range(3):
        np.testing.assert_array_equal(image_collections.image_of(sent, number), picture(number))


def test_coco_has_the_order_of_its_ids(tmp_path):
    coco(tmp_path)
    (tmp_path / "annotations/instances_train2014.json").write_text("{}")
    for split in (None, "train", "train2014"):
        texts, captioned = found(tmp_path, split=split)
        assert list(texts.items()) == list(WANTED.items())
    for index, name in enumerate(WANTED):
        want = picture(list(COCO).index(name))
        np.testing.assert_array_equal(image_collections.image_of(captioned.images, index), want)
    coco(tmp_path, "val2014", annotated({name: COCO[name] for name in list(COCO)[:2]}))
    texts, captioned = found(tmp_path, split="val")
    assert captioned.missing == {"COCO_train2014_000000000011.png": "no caption"}
    assert list(texts)[2] == "COCO_train2014_000000000011.png"
    coco(tmp_path, "train2017")
    with pytest.raises(DataError, match=r"split 'train' of .* is not one of: train2014, train2017, val2014"):
        found(tmp_path)
    file = tmp_path / "annotations/captions_train2014.json"
    file.rename(tmp_path / "elsewhere.json")
    for folder, split in ((tmp_path / "train2014", None), (tmp_path, "train2014")):
        assert list(found(folder, split=split, file=tmp_path / "elsewhere.json")[0].items()) == list(WANTED.items())


def test_names_are_relative_to_the_table_or_to_the_images(tmp_path):
    table(tmp_path / "train")
    rows = (tmp_path / "train/captions.csv").read_text()
    (tmp_path / "train/captions.csv").unlink()
    for prefix in ("", "train/", "./train/", f"{tmp_path}/train/"):
        (tmp_path / "captions.csv").write_text(
            "".join(
                line if line.startswith("filepath") else f"{prefix}{line}" for line in rows.splitlines(keepends=True)
            )
        )
        assert list(found(tmp_path)[0].values()) == list(ITEMS.values()), prefix
    (tmp_path / "metadata.csv").write_text(rows)
    with pytest.raises(DataError, match=r"both .*captions.csv and .*metadata.csv are there: say which one with"):
        found(tmp_path)
    assert list(found(tmp_path, file=tmp_path / "metadata.csv")[0].values()) == list(ITEMS.values())


def test_images_of_a_zip_have_captions_in_a_table(tmp_path):
    table(tmp_path)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for key in ITEMS:
            file.write(tmp_path / f"{key}.png", f"{key}.png")
    assert list(found(tmp_path / "set.zip", file=tmp_path / "captions.csv")[0].values()) == list(ITEMS.values())
    with pytest.raises(DataError, match=r"none of the 3 images in .*set.zip has a caption; a.png: no caption"):
        found(tmp_path / "set.zip")


def test_a_text_beside_an_image_is_one_caption_and_comes_before_json(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        add(file, "a.png", encoded(picture(0)))
        add(file, "a.txt", "\ufefftwo\n lines ".encode())
        add(file, "a.json", b'{"caption": "other"}')
        add(file, "b.png", encoded(picture(1)))
        add(file, "b.json", b'["a", "list"]')
        add(file, "alone.txt", b"no image")
        add(file, "c.cls", b"0")
    texts, captioned = found(tmp_path / "0.tar")
    assert texts == {"0.tar/a": ("two lines",), "0.tar/b": ("a", "list")}
    assert captioned.images.ignored == {"*.cls": 1, "caption without an image": 1}


def test_what_has_no_caption_is_told_image_by_image(tmp_path):
    beside(tmp_path)
    for key, content in {"b": b" \n", "c": b"caf\xe9"}.items():
        (tmp_path / "x" / f"{key}.txt").write_bytes(content)
    pictures(tmp_path, ["x/d.png", "x/e.png"])
    (tmp_path / "x/e.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "x/alone.txt").write_text("no image")
    texts, captioned = found(tmp_path)
    assert [key for key, text in texts.items() if text] == ["x/a.png"]
    assert captioned.missing == {
        "x/b.png": "its captions are empty",
        "x/c.png": "its caption cannot be read: byte 0xe9 is not UTF-8",
        "x/d.png": "no caption",
        "x/e.png": "its caption cannot be read: No such file or directory",
    }
    assert captioned.left_out == {"empty": 1}
    assert captioned.images.ignored == {"*.txt without an image": 1}


def test_bad_captions_of_an_image_with_others_are_left_out_and_counted(tmp_path):
    pictures(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [
        {"file_name": "a.png", "text": ["", "good", "  "]},
        {"file_name": "b.png", "text": ["\ud83d"]},
        {"file_name": "z.png", "text": ["no", "image"]},
        {"file_name": "c.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    texts, captioned = found(tmp_path)
    assert texts == {"a.png": ("good",), "b.png": (), "c.png": ()}
    assert captioned.left_out == {"empty": 2, "damaged": 1}
    assert captioned.missing == {"b.png": "its captions are damaged", "c.png": "no caption"}
    assert captioned.images.ignored == {"caption without an image": 2}


BAD = {
    "metadata.jsonl": [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"', r"line 2: Expecting"),
        ('{"file_name": "a.png", "text": "x"}\n[1]\n', r"line 2: wanted an object"),
        ('{"file_name": "a.png", "label": 3}\n', r"line 1: wanted file_name or .*; given file_name, label"),
        ('{"file_name": 3, "text": "x"}\n', r"line 1: wanted file_name or"),
        ('\n{"file_name": "a.png", "text": ["x", 3]}\n', r"line 2: a caption is 3: wanted a string"),
        (
            b'{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "caf\xe9"}',
            r"line 2: byte 0xe9",
        ),
        ("[" * 100_000, r"line 1: it is nested too deeply"),
    ],
    "captions.csv": [
        ("file_name,caption\na.png,x\nb.png,a cat, on a mat\n", r"line 3: 3 fields, the header has 2: commas need"),
        ('file_name,caption\na.png,"x\ny"\nb.png\n', r"line 4: 1 fields, the header has 2"),
        ('file_name,caption\na.png,x\nb.png,"no end\nc.png,x\n', r"line 3: unexpected end of data"),
        ('file_name,caption\na.png,"x"y\n', r"line 2: ',' expected after '\"'"),
        ("path,caption\na.png,x\n", r"line 1: no column of images: wanted file_name or filepath or image, given path"),
        ("image,label\na.png,x\n", r"line 1: no column of captions: wanted caption or .*, given image, label"),
        ("", r"line 1: no column of images"),
        (b"image,text\na.png,x\nb.png,\xff\xfe\n", r"line 3: byte 0xff is not UTF-8"),
        ("image,text\na.png," + "x" * 200_000, r"line 2: field larger than field limit"),
    ],
}


@pytest.mark.parametrize(("name", "content", "words"), [(name, *case) for name, cases in BAD.items() for case in cases])
def test_a_damaged_table_is_refused_with_its_line(name, content, words, tmp_path):
    pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"captions: .*{name}: {words}"):
        open_captioned(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            annotated(annotations=[{"id": 1, "image_id": 9, "bbox": []}]),
            r"\[0\]: it has no 'caption': wanted cap",
        ),
        ({"images": []}, "it has no list 'annotations': wanted COCO's captions_"),
        ([], "it has no list 'images'"),
        (annotated(annotations=[5]), r"annotations\[0\]: TypeError"),
        (annotated(annotations=[{"id": 1, "image_id": 9, "caption": None}]), r"annotations\[0\]: a caption is None"),
        (annotated(annotations=[{"id": 1.5, "image_id": 9, "caption": "x"}]), r"annotations\[0\]: TypeError"),
        (annotated(annotations=[{"image_id": 9, "caption": "x"}]), r"annotations\[0\]: KeyError: 'id'"),
        (annotated(images=[{"id": 3}]), r"images\[0\]: KeyError: 'file_name'"),
        (annotated(images=[{"id": 3, "file_name": "a"}, {"id": 4, "file_name": "a"}]), "it lists a twice"),
        (annotated(annotations=[]), "none of the 3 images in .*train2014 has a caption"),
    ],
)
def test_json_of_another_kind_is_refused(content, words, tmp_path):
    coco(tmp_path, content=content)
    with pytest.raises(DataError, match=words):
        open_captioned(tmp_path)


def test_damaged_json_is_refused_with_its_line(tmp_path):
    coco(tmp_path)
    file = tmp_path / "annotations/captions_train2014.json"
    file.write_text(json.dumps(annotated(), indent=1)[:200])
    with pytest.raises(DataError, match=r"captions_train2014.json: .*: line \d+ column"):
        open_captioned(tmp_path)
    file.rename(tmp_path / "annotations/instances_train2014.json")
    with pytest.raises(DataError, match=r"annotations has no captions_\*.json, but instances_train2014.json"):
        open_captioned(tmp_path)


def test_files_that_are_not_there_or_no_table_are_refused(tmp_path):
    pictures(tmp_path, ["a.png"])
    with pytest.raises(DataError, match=r"none.csv: No such file or directory"):
        open_captioned(tmp_path, file=tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"a.png: wanted a .json of COCO, a .csv, a .tsv or a .jsonl"):
        open_captioned(tmp_path, file=tmp_path / "a.png")
    with pytest.raises(DataError, match=r"none of the 1 images in .* has a caption; a.png: no caption"):
        open_captioned(tmp_path)

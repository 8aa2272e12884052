"""Captions of collections of images, in the layouts in which such data sets are published.

    COCO    annotations/captions_SPLIT.json beside the folder SPLIT, such as train2014. Images are in the order of their
            COCO ids. The captions of an image are in the order of the ids of the annotations.
    table   captions.csv or metadata.csv, with commas or tabs: a column of NAMES and a column of WORDS. Or
            metadata.jsonl as Hugging Face writes it: one object a line. An image may have several rows.
    tar     WebDataset: KEY.txt beside KEY.jpg, or else KEY.json with `caption`.
    text    KEY.txt beside KEY.jpg. The whole file is one caption.

Names in a table are relative to the table, or to the folder of the images. In JSON, a list is several captions. A
damaged table is an error, which names the line. A damaged file beside one image costs only this image.
"""

import csv
import io
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from diversedit_jax.data import image_collections, local_path
from diversedit_jax.data.image_collections import MAX_BESIDE, ImageFiles
from diversedit_jax.errors import DataError, check_machine
from diversedit_jax.reading import RegularFile, parse_json

TABLES = ("captions.csv", "metadata.csv", "metadata.jsonl")
NAMES = ("file_name", "filepath", "image")  # columns, the first that is there counts
WORDS = ("caption", "text", "title", "prompt")
COCO = re.compile(r"captions_(?P<split>\w+)\.json")


class Captioned(NamedTuple):
    """Images and their captions.

    texts: of each image. (): it has none. missing: image without a caption -> why.
    left_out: why a caption was left out -> how many were.
    """

    images: ImageFiles
    texts: Sequence[tuple[str, ...]]
    missing: Mapping[str, str]
    left_out: Mapping[str, int]


class Found(NamedTuple):
    """What files of captions say. texts: image -> captions. wrong: image -> why its captions cannot be used."""

    texts: Mapping[str, Sequence[str]]
    wrong: Mapping[str, str]


def open_captioned(
    path: str | Path, kind: str | None = None, split: str | None = None, file: str | Path | None = None
) -> Captioned:
    """Open the collection at `path` and its captions. DataError, in one line, if there are none.

    kind, split: as in `image_collections.open_images`. For COCO, split `train` (the default) also means the one year.
    file: the file of captions, in COCO's format or as a table, if it does not lie where the layout has it.
    """
    path = local_path("images", path)
    file = None if file is None else local_path("captions", file)
    if file is None and (path / "annotations").is_dir():
        file, split = _coco_file(path, split or "train")
    beside: dict[str, tuple[str, bytes]] = {}
    images = image_collections.open_images(path, kind, split, unconditional=True, texts=beside)
    if file is None and images.kind != "tar":
        file = _table(images.path, path)
    if file is not None:
        return _listed(images, file)
    if images.kind == "tar":
        return _matched(images, Found(*_readable(beside)))
    found, ignored = _text_files(images) if images.kind == "folder" else (Found({}, {}), images.ignored)
    return _matched(replace(images, ignored=ignored), found)


def _matched(images: ImageFiles, found: Found) -> Captioned:
    """Give each image its captions."""
    texts, missing, left_out = [], {}, Counter()
    for key in images.keys:
        given = [" ".join(text.split()) for text in found.texts.get(key, ())]
        faults = [_fault(text) for text in given]
        left_out.update(filter(None, faults))
        texts.append(tuple(text for text, fault in zip(given, faults, strict=True) if fault is None))
        if not texts[-1]:
            missing[key] = found.wrong.get(key, f"its captions are {faults[0]}" if faults else "no caption")
    if len(missing) == len(images):
        key, why = next(iter(missing.items()))
        raise DataError(f"captions: none of the {len(images)} images in {images.path} has a caption; {key}: {why}")
    alone = sum(len(found.texts[key]) for key in found.texts.keys() - set(images.keys))
    ignored = dict(images.ignored) | ({"caption without an image": alone} if alone else {})
    return Captioned(replace(images, ignored=ignored), texts, missing, left_out)


def _fault(text: str) -> str | None:
    """Why a caption cannot be used; None if it can."""
    try:
        text.encode()
        return None if text else "empty"
    except UnicodeEncodeError:  # JSON can write halves of characters
        return "damaged"


def _coco_file(path: Path, split: str) -> tuple[Path, str]:
    """The file of captions of a split of COCO, and the folder of its images."""
    names = sorted(entry.name for entry in (path / "annotations").iterdir())
    splits = [given["split"] for given in map(COCO.fullmatch, names) if given]
    if not splits:
        others = ", ".join(names[:8]) or "nothing"
        raise DataError(f"captions: {path / 'annotations'} has no captions_*.json, but {others}")
    of_years = re.compile(rf"{re.escape(split)}\d+")
    chosen = [one for one in splits if one == split] or list(filter(of_years.fullmatch, splits))
    if len(chosen) != 1:
        raise DataError(f"captions: split {split!r} of {path} is not one of: {', '.join(splits)}")
    return path / "annotations" / f"captions_{chosen[0]}.json", chosen[0]


def _table(folder: Path, above: Path) -> Path | None:
    """The table beside the images, or in the folder of the splits; None if there is none."""
    found = [top / name for top in dict.fromkeys((folder, above)) for name in TABLES if (top / name).is_file()]
    if len(found) > 1:
        raise DataError(f"captions: both {found[0]} and {found[1]} are there: say which one with --captions")
    return found[0] if found else None


def _listed(images: ImageFiles, file: Path) -> Captioned:
    """The images with the captions of one file."""
    read = {".json": _coco, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl}.get(file.suffix)
    if read is None:
        raise DataError(f"captions: {file}: wanted a .json of COCO, a .csv, a .tsv or a .jsonl")
    texts: dict[str, list[str]] = {}
    names = _names(images, file)
    try:
        with RegularFile(file) as opened:
            content = opened.read()
        for name, given in read(content):
            texts.setdefault(names(name), []).extend(given)
    except (OSError, ValueError) as error:
        check_machine(error)
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"captions: {file}: {why}") from error
    ignored = Counter(images.ignored)
    ignored[f"*{file.suffix}"] -= file.parent == images.path  # it is used
    images = replace(images, ignored=+ignored)
    return _matched(_in_order(images, texts) if read is _coco else images, Found(texts, {}))


def _names(images: ImageFiles, file: Path) -> Callable[[str], str]:
    """Maps the name of an image in a table to its key in the collection, which is relative to the images' folder."""
    keys = set(images.keys)
    tops = (f"{images.path.as_posix()}/", f"{Path(os.path.relpath(images.path, file.parent)).as_posix()}/")

    def key(name: str) -> str:
        name = PurePosixPath(name).as_posix()
        top = next((top for top in tops if name.startswith(top)), "")
        return name if name in keys else name.removeprefix(top)

    return key


def _in_order(images: ImageFiles, names: Mapping[str, Any]) -> ImageFiles:
    """The images in the order of these names; others follow."""
    place = {key: index for index, key in enumerate(images.keys)}
    order = [place[name] for name in names if name in place]
    order += [index for key, index in place.items() if key not in names]
    return replace(images, keys=[images.keys[i] for i in order], read=partial(_nth, images.read, np.array(order)))


def _nth(read: Callable[[int], bytes], order: np.ndarray, index: int) -> bytes:
    return read(int(order[index]))


def _coco(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yield name and captions of each image of COCO's JSON, in the order of the ids. ValueError names what is wrong."""
    whole = parse_json(content)
    for part in ("images", "annotations"):
        if not isinstance(whole, dict) or not isinstance(whole.get(part), list):
            raise ValueError(f"it has no list {part!r}: wanted COCO's captions_*.json")
    names = {}
    for number, image in enumerate(whole["images"]):
        try:
            names[operator.index(image["id"])] = str(image["file_name"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"images[{number}]: {type(error).__name__}: {error}") from error
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, one in enumerate(whole["annotations"]):
        try:
            if "caption" not in one:
                raise ValueError("it has no 'caption': wanted captions_*.json, not instances_*.json or others")
            (text,) = _strings([one["caption"]])
            captions.setdefault(operator.index(one["image_id"]), []).append((operator.index(one["id"]), text))
        except (TypeError, KeyError, ValueError) as error:
            why = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"annotations[{number}]: {why}") from error
    if len(set(names.values())) < len(whole["images"]):
        raise ValueError(f"it lists {Counter(names.values()).most_common(1)[0][0]} twice")
    for number in sorted(names.keys() | captions.keys()):
        yield names.get(number, f"image {number}"), [text for _, text in sorted(captions.get(number, ()))]


def _csv(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yield name and caption of each row. ValueError names the line."""
    text = _decoded(content)
    tabs = "\t" in text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    line = 1
    try:
        header = next(rows, [])
        name, words = (next((header.index(one) for one in known if one in header), None) for known in (NAMES, WORDS))
        for what, column, known in (("images", name, NAMES), ("captions", words, WORDS)):
            if column is None:
                raise ValueError(f"no column of {what}: wanted {' or '.join(known)}, given {', '.join(header)}")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"{len(row)} fields, the header has {len(header)}: commas need quotes around them")
            if row:
                yield row[name], [row[words]]
            line = rows.line_num + 1
    except (csv.Error, ValueError) as error:
        raise ValueError(f"line {line}: {error}") from error


def _jsonl(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yield name and captions of each line. ValueError names the line."""
    for line, text in enumerate(content.split(b"\n"), 1):
        try:
            if not text.strip():
                continue
            row = parse_json(_decoded(text))
            if not isinstance(row, dict):
                raise ValueError("wanted an object")
            name, words = (next((one for one in known if one in row), None) for known in (NAMES, WORDS))
            if name is None or words is None or not isinstance(row[name], str):
                raise ValueError(f"wanted {' or '.join(NAMES)}, and {' or '.join(WORDS)}; given {', '.join(row)}")
            yield row[name], _strings(row[words])
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error


def _strings(value: Any) -> list[str]:
    """One or several captions in JSON; null is none."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in given if not isinstance(one, str)]:
        raise ValueError(f"a caption is {wrong[0]!r:.80}: wanted a string")
    return given


def _decoded(content: bytes) -> str:
    """Text in UTF-8. ValueError names the line and the byte."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        what = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise ValueError(f"line {line + 1}: {what}" if b"\n" in content else what) from error


def _readable(beside: Mapping[str, tuple[str, bytes]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The parts of `Found` in what lies beside images: key -> ending, content."""
    texts: dict[str, list[str]] = {}
    wrong: dict[str, str] = {}
    for key, (suffix, content) in beside.items():
        try:
            text = _decoded(content)
            if suffix == "json":
                value = parse_json(text)
                texts[key] = _strings(value.get("caption") if isinstance(value, dict) else value)
            else:
                texts[key] = [text]
        except ValueError as error:
            wrong[key] = f"its caption cannot be read: {error}"
    return texts, wrong


def _text_files(images: ImageFiles) -> tuple[Found, dict[str, int]]:
    """What the text files beside images say, and the other files that are ignored."""
    names = [PurePosixPath(key).with_suffix(".txt").as_posix() for key in images.keys]
    beside, wrong = {}, {}
    for index, (key, name) in enumerate(zip(images.keys, names, strict=True)):
        if os.path.lexists(images.path / name):
            try:
                beside[key] = "txt", image_collections.read_file(images.path, names, index)[:MAX_BESIDE]
            except DataError as error:
                wrong[key] = f"its caption {error}"
    texts, damaged = _readable(beside)
    used = {name for key, name in zip(images.keys, names, strict=True) if key in beside or key in wrong}
    ignored = Counter(images.ignored)
    ignored["*.txt without an image"] = ignored.pop("*.txt", 0) - len(used)
    return Found(texts, wrong | damaged), dict(+ignored)

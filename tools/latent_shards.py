"""A set of latents on disk: shards, their checksums, the metadata, and the check of a finished set.

Shard s holds the readable images s * per_shard .. (s + 1) * per_shard - 1 of the collection, or all clips of these
videos, whichever process writes it. It appears whole or not at all. Then its note is written, `notes/00003.json`:
checksum, number of records, skipped images and why. A shard without a note is written anew. When all shards have notes,
the metadata of tfds follow. The last file is `latents.json`: a set without it is not finished. If two processes write
one shard by mistake, the first one ends with an error, and the shard is that of the other.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from diversedit_jax.data import latents
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.reading import check_folder, read_json
from diversedit_jax.runtime.files import check_same, replacing, write_json

NAME, SPLIT = "latents", "train"
PLAN, WHOLE, NOTES = "plan.json", latents.ABOUT, "notes"


class Plan(NamedTuple):
    """Everything that decides the records of a set."""

    about: dict[str, Any]  # for latents.json
    features: tfds.features.FeaturesDict
    count: int  # of images, or of videos
    per_shard: int  # images or videos
    what: str = "images"  # or videos, each of which gives any number of records

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.per_shard)

    @property
    def content(self) -> dict[str, Any]:
        """The plan as JSON."""
        return self.about | {self.what: self.count, "per_shard": self.per_shard, "features": sorted(self.features)}

    def images(self, shard: int) -> range:
        """The images or videos of a shard, by their number in the collection."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def file(self, shard: int) -> str:
        """The name of a shard's file."""
        return f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{self.shards:05d}"


def features(
    shape: tuple[int, ...],
    size: int,
    image: str | None,
    cached: dict[str, tuple],
    classes: tuple[str, ...],
    length: int | None = None,
) -> tfds.features.FeaturesDict:
    """The features of a set: those of `diversedit_jax.data.latents`, and `key`, the name of the image.

    shape: of the latents [h w c] or [f h w c]. image: encoding of the crops of `size` pixels, or None. cached: shapes
    of the features of encoders by name. length: tokens of a caption; None: the set has labels.
    """
    *sides, channels = shape

    def both(*shape: int) -> tfds.features.Tensor:  # of the image and its mirror image
        return tfds.features.Tensor(shape=(2, *shape), dtype=np.float16, encoding="bytes")

    found = {"moments": both(*sides, 2 * channels), "key": tfds.features.Text()}
    if length is not None:
        found["tokens"] = tfds.features.Tensor(shape=(None, length), dtype=np.int32, encoding="bytes")
        found["text"] = tfds.features.Sequence(tfds.features.Text())
    else:
        found["label"] = tfds.features.ClassLabel(names=list(classes)) if classes else tfds.features.Scalar(np.int32)
    if image is not None:
        found["image"] = tfds.features.Image(shape=(size, size, 3), encoding_format=image)
        if len(sides) == 3:
            found["image"] = tfds.features.Sequence(found["image"], length=sides[0])
    return tfds.features.FeaturesDict(found | {name: both(*shape) for name, shape in cached.items()})


def collection_digest(keys: Sequence[str], labels: np.ndarray) -> str:
    """sha256 of the names and labels of a collection, in hex."""
    return hashlib.sha256("\0".join(keys).encode() + np.asarray(labels, "<i4").tobytes()).hexdigest()


def claim(folder: Path, plan: Plan) -> bool:
    """Make the folder of a set, or check that its set has the same plan; returns whether the set is finished.

    ConfigError for a set with another plan, or for a folder that cannot be used.
    """
    ours = plan.content
    try:
        (folder / NOTES).mkdir(parents=True, exist_ok=True)
        for file in (WHOLE, PLAN):
            if (folder / file).exists():
                theirs = read_json(folder / file)
                if not isinstance(theirs, dict):
                    raise ValueError(f"{file} is no JSON object")
                begun = {key: theirs.get(key) for key in ours}
                check_same(f"{folder} holds a set", begun, ours, "use its settings or another folder")
                return file == WHOLE
        write_json(folder / PLAN, ours)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be used: {error}") from error
    return False


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn errors of writing into a DataError that names the file."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # from computing the records
        raise
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise DataError(f"{place} cannot be written: {str(error).partition(chr(10))[0]}") from error


def note(folder: Path, shard: int) -> dict[str, Any] | None:
    """The note of a shard; None if the shard is not whole."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(folder / NOTES / f"{shard:05d}.json")
    return None


def write_shard(
    folder: Path,
    plan: Plan,
    shard: int,
    records: Iterable[dict[str, Any]],
    skipped: dict[str, str],
    counts: Mapping[str, int] | None = None,
) -> None:
    """Write a shard, whole or not at all, then its note. DataError if the disk refuses it.

    records: the examples, in order. skipped: missing image or video -> why, complete when `records` ends. counts: what
    else was counted, complete then too; `videos_read`: the videos that gave
    records.
    ConfigError if the folder has another plan: of two that claimed it at the same moment, the last one has it.
    """
    claim(folder, plan)
    place = folder / plan.file(shard)
    checksum, count, size = hashlib.sha256(), 0, 0
    for left in folder.glob(f".{place.name}.*"):  # by a killed process
        left.unlink(missing_ok=True)
    with writing(place), replacing(place) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")  # for random access
        try:
            for example in records:
                content = serialize(plan.features, example)
                writer.write(content)
                checksum.update(content)
                count, size = count + 1, size + len(content)
        finally:
            writer.close()
        done = count if plan.what == "images" else counts["videos_read"]
        if done + len(skipped) != (wanted := len(plan.images(shard))):
            raise DataError(f"{place}: {done} done and {len(skipped)} skipped of {wanted} {plan.what}")
    found = {"records": count, "bytes": size, "sha256": checksum.hexdigest(), "skipped": skipped}
    found["counts"] = dict(counts or {})
    write_json(folder / NOTES / f"{shard:05d}.json", found)


def serialize(features: tfds.features.FeaturesDict, example: dict[str, Any]) -> bytes:
    """An example as stored bytes: the same in all processes and with all versions of protobuf."""
    parsed = tf_example_pb2.Example.FromString(features.serialize_example(example))
    return parsed.SerializeToString(deterministic=True)


def missing(folder: Path, plan: Plan) -> list[int]:
    """The shards that are not whole yet."""
    return [s for s in range(plan.shards) if note(folder, s) is None or not (folder / plan.file(s)).exists()]


def finish(folder: Path, plan: Plan) -> dict[str, Any]:
    """Write the metadata of a set with whole shards; returns the content of latents.json."""
    notes = [note(folder, shard) for shard in range(plan.shards)]
    lengths = [found["records"] for found in notes]
    if not sum(lengths):
        raise DataError(f"{folder}: none of {plan.count} {plan.what} could be read; see report.json")
    template = tfds.core.ShardedFileTemplate(
        str(folder), dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(SPLIT, lengths, sum(found["bytes"] for found in notes), filename_template=template)
    with writing(folder / "dataset_info.json"):  # check_data would read the shards with TensorFlow
        tfds.folder_dataset.write_metadata(
            data_dir=str(folder), features=plan.features, split_infos=[split], check_data=False
        )
    shards = [
        {"file": plan.file(shard), "records": found["records"], "sha256": found["sha256"]}
        for shard, found in enumerate(notes)
    ]
    content = plan.content | {"records": sum(lengths), "shards": shards} | counted(notes)
    write_json(folder / WHOLE, content)
    return content


def counted(notes: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The sums of the counts in the notes."""
    total: Counter[str] = Counter()
    for found in notes:
        total.update(found.get("counts", {}))
    return dict(total)


def whole(folder: Path) -> dict[str, Any]:
    """The content of latents.json; DataError if the set is not finished."""
    try:
        check_folder(folder)
        found = read_json(folder / WHOLE)
        for name in ("shape", "classes", "vae", "image", "records", "shards"):
            if name not in found:
                raise ValueError(f"it has no {name!r}; tools.prepare_latents writes it")
        return found
    except FileNotFoundError:
        begun = (folder / PLAN).exists()
        why = "its preparation is not finished: run the same command again" if begun else f"it has no {WHOLE}"
        raise DataError(f"{folder} is not a whole set of latents: {why}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / WHOLE} cannot be read: {error}") from error


def records(file: Path) -> Iterator[bytes]:
    """The stored records of a shard. A damaged record raises when its turn comes."""
    reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    try:
        for begin in range(0, reader.num_records(), 64):
            indices = list(range(begin, min(begin + 64, reader.num_records())))
            try:
                found = reader.read(indices)
            except Exception:  # array_record raises several kinds; read one by one to find the damaged record
                found = (reader.read([index])[0] for index in indices)
            yield from found
    finally:
        reader.close()


def verify(folder: Path) -> Iterator[int]:
    """Read a finished set; yields the number of records of each good shard. DataError names a fault and its place."""
    about = whole(folder)
    try:
        *sides, channels = map(int, about["shape"])
        classes, captions = len(about["classes"] or [0]), about.get("captions")
        if captions is not None:
            captions = {name: int(captions[name]) for name in ("vocabulary", "length", "start", "end")}
        shards = [(folder / str(one["file"]), int(one["records"]), one["sha256"]) for one in about["shards"]]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{folder / WHOLE} cannot be used: {type(error).__name__}: {error}") from error
    for file, wanted, digest in shards:
        checksum, count = hashlib.sha256(), 0
        try:
            for count, record in enumerate(records(file), 1):
                checksum.update(record)
                if wrong := fault(record, (2, *sides, 2 * channels), classes, captions):
                    raise DataError(f"{file}, record {count - 1}: {wrong}")
        except DataError:
            raise
        except Exception as error:  # array_record raises several kinds
            raise DataError(f"{file}, record {count}: {str(error).partition(chr(10))[0]}") from error
        if count != wanted:
            raise DataError(f"{file} has {count} records, {WHOLE} says {wanted}")
        if checksum.hexdigest() != digest:
            raise DataError(f"{file}: the checksum differs: its records were changed after they were written")
        yield count
    info, _ = latents.open_source(folder, SPLIT)
    if list(info.splits[SPLIT].shard_lengths) != [wanted for _, wanted, _ in shards]:
        raise DataError(f"{folder}: dataset_info.json and {WHOLE} differ in the numbers of records")


def fault(record: bytes, shape: tuple[int, ...], classes: int, captions: Mapping[str, Any] | None = None) -> str | None:
    """The fault of a record; None if it is good. captions: as in latents.json, for a set without labels."""
    stored = latents.parsed(record)
    moments = np.frombuffer(stored["moments"].bytes_list.value[0], np.float16).astype(np.float32)
    if moments.size != np.prod(shape):
        return f"{moments.size} moments, wanted {list(shape)}"
    mean, std = np.split(moments.reshape(shape), 2, axis=-1)
    if not np.isfinite(moments).all():
        return "moments that are not finite"
    if std.min() < 0 or not std.any():
        return f"a standard deviation of {std.min():.3g}" if std.any() else "standard deviations that are all 0"
    if np.abs(mean).max() > 1e3:
        return f"a mean of {np.abs(mean).max():.3g}: no latent is so large"
    if captions is not None:
        return token_fault(stored["tokens"].bytes_list.value[0], len(stored["text"].bytes_list.value), captions)
    label = stored["label"].int64_list.value[0]
    return None if 0 <= label < classes else f"label {label} is not in 0 .. {classes - 1}"


def token_fault(content: bytes, count: int, captions: Mapping[str, Any]) -> str | None:
    """The fault of the token ids of `count` captions; None if they are good."""
    ids = np.frombuffer(content, np.int32)
    if not count or ids.size != count * captions["length"]:
        return f"{ids.size} token ids, wanted {captions['length']} for each of {count} captions"
    ids = ids.reshape(count, -1)
    if ids.min() < 0 or ids.max() >= captions["vocabulary"]:
        return f"token ids {ids.min()} .. {ids.max()} are not in 0 .. {captions['vocabulary'] - 1}"
    ends = (ids[:, 0] == captions["start"]) & (ids[:, -1] == captions["end"])
    return None if ends.all() else f"caption {ends.argmin()} does not begin and end as tokens do"

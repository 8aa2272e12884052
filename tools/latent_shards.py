"""A set of latents on disk while it is written, and whether it is whole: shards, their checksums, their metadata.

Shard s holds the images s * per_shard .. (s + 1) * per_shard - 1 of the collection that could be read, whoever writes
it. It is written beside its place and renamed when it is whole; then its note says so, `notes/00003.json`: checksum,
number of records, images that were skipped and why. A shard without a note is written anew. When all have one, the
metadata of tfds are written, and last `latents.json`, without which a set is not whole. Of two processes that write the
same shard by mistake the first one ends with an error, and the shard is the other's.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from diversedit_jax.data import latents
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.runtime.files import check_same, replacing, write_json

NAME, SPLIT = "latents", "train"
PLAN, WHOLE, NOTES = "plan.json", latents.ABOUT, "notes"
OPTIONS = "group_size:1"  # as grain and tfds read them


class Plan(NamedTuple):
    """What makes a set what it is: the same plan gives the same records, so that another one may not go on with it.

    about: what readers need to know; becomes latents.json. features: of tfds. count: of images. per_shard: of images.
    """

    about: dict[str, Any]
    features: tfds.features.FeaturesDict
    count: int
    per_shard: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.per_shard)

    def images(self, shard: int) -> range:
        """The images of a shard, by their number in the collection."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def file(self, shard: int) -> str:
        """The name of a shard's file."""
        return f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{self.shards:05d}"


def features(
    shape: tuple[int, int, int],
    size: int,
    image: str | None,
    cached: dict[str, tuple[int, ...]],
    classes: tuple[str, ...],
) -> tfds.features.FeaturesDict:
    """The features of a set, as `diversedit_jax.data.latents` describes them, and `key`, the name of the image.

    shape: of the latents. image: encoding of the crops of `size` pixels, None for none. cached: features of encoders.
    """
    h, w, k = shape

    def both(*shape: int) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(2, *shape), dtype=np.float16, encoding="bytes")

    found = {"moments": both(h, w, 2 * k), "key": tfds.features.Text()}
    found["label"] = tfds.features.ClassLabel(names=list(classes)) if classes else tfds.features.Scalar(np.int32)
    if image is not None:
        found["image"] = tfds.features.Image(shape=(size, size, 3), encoding_format=image)
    return tfds.features.FeaturesDict(found | {name: both(*shape) for name, shape in cached.items()})


def collection_digest(keys: Sequence[str], labels: np.ndarray) -> str:
    """sha256 of the names and labels of a collection, in hex."""
    found = hashlib.sha256("\0".join(keys).encode())
    found.update(np.asarray(labels, "<i4").tobytes())
    return found.hexdigest()


def claim(folder: Path, plan: Plan) -> bool:
    """Make the folder of a set, or see that it holds one of the same plan, which may be whole: then it returns True.

    ConfigError for one of another plan, or for a folder that cannot be used.
    """
    ours = plan.about | {"images": plan.count, "per_shard": plan.per_shard, "features": sorted(plan.features)}
    try:
        (folder / NOTES).mkdir(parents=True, exist_ok=True)
        for file in (WHOLE, PLAN):
            if (folder / file).exists():
                theirs = json.loads((folder / file).read_text(encoding="utf-8"))
                begun = {key: theirs.get(key) for key in ours}
                check_same(f"{folder} holds a set", begun, ours, "use its settings or another folder")
                return file == WHOLE
        write_json(folder / PLAN, ours)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder} cannot be used: {error}") from error
    return False


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within it, what the disk refuses is a DataError that names the file."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # of the devices that compute what is written
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: array_record
        raise DataError(f"{place} cannot be written: {str(error).partition(chr(10))[0]}") from error


def note(folder: Path, shard: int) -> dict[str, Any] | None:
    """What was noted of a whole shard; None if it is not whole."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((folder / NOTES / f"{shard:05d}.json").read_text(encoding="utf-8"))
    return None


def write_shard(
    folder: Path, plan: Plan, shard: int, records: Iterable[dict[str, Any]], skipped: dict[str, str]
) -> int:
    """Write a shard whole or not at all, then its note; returns its bytes. DataError if the disk does not take it.

    records: the examples, in order; `skipped` is read when they are at an end: image -> why it is not among them.
    """
    place = folder / plan.file(shard)
    checksum, count, size = hashlib.sha256(), 0, 0
    for left in folder.glob(f".{place.name}.*"):  # by one that was killed
        left.unlink(missing_ok=True)
    with writing(place), replacing(place) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), OPTIONS)
        try:
            for example in records:
                content = serialize(plan.features, example)
                writer.write(content)
                checksum.update(content)
                count, size = count + 1, size + len(content)
        finally:
            writer.close()
        if count + len(skipped) != len(plan.images(shard)):
            raise DataError(f"{place}: {count} records and {len(skipped)} skipped of {len(plan.images(shard))} images")
    found = {"records": count, "bytes": size, "sha256": checksum.hexdigest(), "skipped": skipped}
    write_json(folder / NOTES / f"{shard:05d}.json", found)
    return size


def serialize(features: tfds.features.FeaturesDict, example: dict[str, Any]) -> bytes:
    """An example as it is stored: the same bytes for the same example, in all processes and versions of protobuf."""
    parsed = tf_example_pb2.Example.FromString(features.serialize_example(example))
    return parsed.SerializeToString(deterministic=True)


def missing(folder: Path, plan: Plan) -> list[int]:
    """The shards that are not whole yet."""
    return [
        shard for shard in range(plan.shards) if note(folder, shard) is None or not (folder / plan.file(shard)).exists()
    ]


def finish(folder: Path, plan: Plan) -> dict[str, Any]:
    """Write the metadata of a set whose shards are all whole; returns what latents.json says."""
    notes = [note(folder, shard) for shard in range(plan.shards)]
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[found["records"] for found in notes],
        num_bytes=sum(found["bytes"] for found in notes),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=str(folder), dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
        ),
    )
    if not sum(split.shard_lengths):
        raise DataError(f"{folder}: none of {plan.count} images could be read; see report.json")
    with writing(folder / "dataset_info.json"):  # check_data would read the shards with TensorFlow
        tfds.folder_dataset.write_metadata(
            data_dir=str(folder), features=plan.features, split_infos=[split], check_data=False
        )
    shards = [
        {"file": plan.file(shard), "records": found["records"], "sha256": found["sha256"]}
        for shard, found in enumerate(notes)
    ]
    plan_of = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    whole = plan_of | {"records": sum(split.shard_lengths), "shards": shards}
    write_json(folder / WHOLE, whole)
    return whole


def whole(folder: Path) -> dict[str, Any]:
    """What latents.json says of a set; DataError if it is not whole."""
    try:
        found = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        lacks = [name for name in ("shape", "classes", "vae", "image", "records", "shards") if name not in found]
        if lacks:
            raise ValueError(f"it does not say {lacks[0]!r}; tools.prepare_latents writes it")
        return found
    except FileNotFoundError:
        plan = folder / PLAN
        why = "its preparation is not finished: run the same command again" if plan.exists() else f"it has no {WHOLE}"
        raise DataError(f"{folder} is not a whole set of latents: {why}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / WHOLE} cannot be read: {error}") from error


def records(file: Path) -> Iterator[bytes]:
    """The records of a shard, as they are stored; one that cannot be read raises after those before it."""
    reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    try:
        for begin in range(0, reader.num_records(), 64):
            indices = list(range(begin, min(begin + 64, reader.num_records())))
            try:
                found = reader.read(indices)
            except Exception:  # of several kinds; one by one, so that it is clear which
                found = (reader.read([index])[0] for index in indices)
            yield from found
    finally:
        reader.close()


def verify(folder: Path) -> Iterator[int]:
    """Read a whole set, yielding the number of records of each good shard; DataError names what is wrong, and where."""
    about = whole(folder)
    classes = len(about["classes"]) if about["classes"] else 1
    h, w, k = about["shape"]
    for shard in about["shards"]:
        checksum, count = hashlib.sha256(), 0
        file = folder / shard["file"]
        try:
            for count, record in enumerate(records(file), 1):
                checksum.update(record)
                wrong = fault(record, (2, h, w, 2 * k), classes)
                if wrong:
                    raise DataError(f"{file}, record {count - 1}: {wrong}")
        except DataError:
            raise
        except Exception as error:  # array_record raises several kinds
            raise DataError(f"{file}, record {count}: {str(error).partition(chr(10))[0]}") from error
        if count != shard["records"]:
            raise DataError(f"{file} has {count} records, {WHOLE} says {shard['records']}")
        if checksum.hexdigest() != shard["sha256"]:
            raise DataError(f"{file}: its records are not those that were written: the checksum differs")
        yield count
    counts = [shard["records"] for shard in about["shards"]]
    info, _ = latents.open_source(folder, SPLIT)
    if list(info.splits[SPLIT].shard_lengths) != counts:
        raise DataError(f"{folder}: dataset_info.json and {WHOLE} differ in the numbers of records")


def fault(record: bytes, shape: tuple[int, ...], classes: int) -> str | None:
    """What is wrong with a record, None if nothing is."""
    stored = latents.parsed(record)
    moments = np.frombuffer(stored["moments"].bytes_list.value[0], np.float16).astype(np.float32)
    if moments.size != np.prod(shape):
        return f"{moments.size} moments, wanted {list(shape)}"
    mean, std = np.split(moments.reshape(shape), 2, axis=-1)
    label = stored["label"].int64_list.value[0]
    if not np.isfinite(moments).all():
        return "moments that are not finite"
    if std.min() < 0 or not std.any():
        return f"a standard deviation of {std.min():.3g}" if std.any() else "standard deviations that are all 0"
    if np.abs(mean).max() > 1e3:
        return f"a mean of {np.abs(mean).max():.3g}: no latent is so large"
    if not 0 <= label < classes:
        return f"label {label} is not in 0 .. {classes - 1}"
    return None

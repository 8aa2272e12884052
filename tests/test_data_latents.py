"""Latents on disk: what is written is what is read, and a directory that does not fit is refused in one line."""

import contextlib
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diversedit_jax import data
from diversedit_jax.data import pipeline
from diversedit_jax.errors import DataError

SHAPE = (4, 6, 2)


def moments(index: int) -> np.ndarray:
    """Moments [2 h w 2c] of which every number tells its record and whether it is mirrored."""
    return np.stack([np.full((4, 6, 4), index, np.float16), np.full((4, 6, 4), index + 100, np.float16)])


def write(directory, count=20, shape=(2, 4, 6, 4), dtype=np.float16, name="moments", label=None, labels=range(10)):
    """A tfds dataset of `count` records as the module describes, or not quite; returns its directory."""
    features = {
        name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes"),
        "label": label or tfds.features.Scalar(np.int32),
    }

    class Latents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": iter([(0, self.example(0))])}

        def _generate_examples(self):
            for index in range(count):
                yield index, self.example(index)

        def example(self, index):
            values = moments(index) if shape == (2, 4, 6, 4) else np.zeros(shape)
            return {name: values.astype(dtype), "label": labels[index % len(labels)]}

    builder = Latents(data_dir=str(directory), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return str(builder.data_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents"))


def make(directory, split="train", **options):
    return data.make("latents", split, **{"data_dir": directory, "shape": SHAPE, "num_classes": 10} | options)


def test_what_is_written_is_read(written):
    dataset = make(written)
    assert (len(dataset.source), dataset.shape, dataset.num_classes) == (20, SHAPE, 10)
    assert dataset.transform is None
    for index in (0, 13):
        example = dataset.source[index]
        np.testing.assert_array_equal(example["moments"], moments(index)[0])
        assert (example["moments"].dtype, example["y"].dtype) == (np.float16, np.int32)
        assert example["y"] == index % 10


def test_half_of_the_draws_are_mirrored(written):
    dataset = make(written, mirror=True)
    rng = np.random.default_rng(0)
    drawn = [dataset.transform(dataset.source[3], rng) for _ in range(400)]
    assert {tuple(sorted(example)) for example in drawn} == {("moments", "y")}
    values = np.array([example["moments"] for example in drawn])
    assert set(np.unique(values)) == {3, 103}
    assert abs(np.mean(values[:, 0, 0, 0] == 103) - 0.5) < 0.08


def test_mirrored_and_plain_latents_make_batches(written):
    for mirror in (False, True):
        with contextlib.closing(pipeline.batches(make(written, mirror=mirror), 8, seed=0)) as batches:
            batch = next(batches)
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "moments": ((8, 4, 6, 4), np.float16),
            "y": ((8,), np.int32),
        }


def one_line(error) -> bool:
    return "\n" not in str(error.value)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"latents: data_dir .*nowhere is not a directory") as error:
        make(str(tmp_path / "nowhere"))
    assert one_line(error)


def test_another_directory_is_not_a_dataset(tmp_path):
    with pytest.raises(DataError, match="is not a tfds dataset") as error:
        make(str(tmp_path))
    assert one_line(error)


def test_an_unknown_split_lists_the_known(written):
    with pytest.raises(DataError, match=r"cannot open split 'val' .*train.*test") as error:
        make(written, "val")
    assert one_line(error)


@pytest.mark.parametrize(
    ("written_as", "asked", "message"),
    [
        ({"name": "latent"}, {}, "no feature 'moments', given: label, latent"),
        ({}, {"shape": (8, 8, 2)}, r"shape \(2, 4, 6, 4\), wanted \(2, 8, 8, 4\)"),
        ({"shape": (4, 6, 4)}, {}, r"shape \(4, 6, 4\), wanted \(2, 4, 6, 4\)"),
        ({"dtype": np.float32}, {}, "moments is float32, wanted float16"),
        ({"label": tfds.features.Scalar(np.float32)}, {}, "label is float32, wanted integer"),
        ({"label": tfds.features.ClassLabel(num_classes=12)}, {}, "have 12 classes, num_classes is 10"),
    ],
)
def test_features_that_do_not_fit_say_given_and_wanted(tmp_path, written_as, asked, message):
    directory = write(tmp_path, **written_as)
    with pytest.raises(DataError, match=message) as error:
        make(directory, **asked)
    assert one_line(error)


def test_an_empty_split_is_refused(written):
    with pytest.raises(DataError, match=r"split 'train\[5:5\]' of .* is empty") as error:
        make(written, "train[5:5]")
    assert one_line(error)


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_out_of_range_names_its_record(tmp_path, label):
    dataset = make(write(tmp_path, labels=[0, 1, label]))
    with pytest.raises(DataError, match=rf"record 2: label {label} is not in 0 .. 9"):
        dataset.source[2]


def test_a_damaged_record_is_an_error_that_names_it(tmp_path):
    directory = write(tmp_path)
    dataset = make(directory)
    (shard,) = tmp_path.rglob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(bytes(content), np.uint8))
    content[used[len(used) // 2]] ^= 0xFF
    shard.write_bytes(content)
    with (
        contextlib.closing(pipeline.batches(dataset, 20, seed=0)) as batches,
        pytest.raises(DataError, match=r"record \d+: .*record \d+: "),
    ):
        next(batches)

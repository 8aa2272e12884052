"""Latents on disk: what is written is what is read, and a directory that does not fit is refused in one line."""

import contextlib
import io
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diversedit_jax import data
from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError, DataError

SHAPE = (4, 6, 2)


def moments(index: int) -> np.ndarray:
    """Moments [2 h w 2c]: every number says its record and whether it is mirrored."""
    return np.stack([np.full((4, 6, 4), index, np.float16), np.full((4, 6, 4), index + 100, np.float16)])


def pixels(index: int) -> np.ndarray:
    """An image [h w 3] that differs from its mirror image and tells its record."""
    return np.random.default_rng(index).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """Encoded bytes, which tfds takes without TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# What a record may hold for alignment: feature, and its value in record i.
PNG = {"image": (tfds.features.Image(shape=(8, 12, 3), encoding_format="png"), lambda i: png(pixels(i)))}
RAW = {"image": (tfds.features.Tensor(shape=(8, 12, 3), dtype=np.uint8, encoding="bytes"), pixels)}


def both(*shape):
    """A cached array with versions for the image and its mirror image, full of i and i + 100."""

    def value(i):
        return np.stack([np.full(shape, i, np.float16), np.full(shape, i + 100, np.float16)])

    return tfds.features.Tensor(shape=(2, *shape), dtype=np.float16, encoding="bytes"), value


CACHED = {"features/dinov2": both(5, 3), "token/dinov2": both(3)}


def write(
    directory, count=20, shape=(2, 4, 6, 4), dtype=np.float16, name="moments", label=None, labels=range(10), more=None
):
    """A tfds dataset of `count` records as the module describes, or not quite; returns its directory."""
    features = {
        name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes"),
        "label": label or tfds.features.Scalar(np.int32),
    }
    more = more or {}
    features |= {key: feature for key, (feature, _) in more.items()}

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
            example = {name: values.astype(dtype), "label": labels[index % len(labels)]}
            return example | {key: value(index) for key, (_, value) in more.items()}

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
    assert (len(dataset.source), dataset.space) == (20, Space(SHAPE, Conditions.labels(10)))
    assert dataset.transform is None
    for index in (0, 13):
        example = dataset.source[index]
        np.testing.assert_array_equal(example["moments"], moments(index)[0])
        assert (example["moments"].dtype, example["y"].dtype) == (np.float16, np.int32)
        assert example["y"] == index % 10


def test_a_record_of_a_part_of_a_split_is_named_by_its_place_in_the_shard(written):
    source = make(written, "train[5:9]").source
    assert len(source) == 4
    np.testing.assert_array_equal(source[2]["moments"], moments(7)[0])
    assert source.place(2) == "latents-train.array_record-00000-of-00001, number 7"


def test_a_record_of_two_parts_of_a_split_is_named_by_its_place_too(written):
    source = make(written, "train[5:9]+train[12:14]").source
    assert len(source) == 6
    for index, number in ((3, 8), (4, 12), (5, 13)):
        np.testing.assert_array_equal(source[index]["moments"], moments(number)[0])
        assert source.place(index) == f"latents-train.array_record-00000-of-00001, number {number}"
    assert source.place(6) == "beyond the last shard"


@pytest.fixture
def said(written, tmp_path):
    """(what latents.json says) -> the data set, whose shape and classes are those that are stored."""

    def make_of(**says):
        (tmp_path / "latents.json").write_text(json.dumps({"format": 1, "moments": "mean_std"} | says))
        return make(str(tmp_path), shape=None, num_classes=None)

    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return make_of


def test_shape_classes_and_scale_are_those_that_are_stored(said):
    dataset = said(classes=list("0123456789"), vae={"scale": 0.25})
    assert (dataset.space, dataset.scale) == (Space(SHAPE, Conditions.labels(10, "0123456789")), 0.25)
    dataset = said(classes=None)
    assert (dataset.space.conditions.classes, dataset.scale) == (0, None)
    assert dataset.source[10]["y"] == 0, "without classes every label is 0"
    with pytest.raises(DataError, match=r"label 1 is not in 0 \.\. 0"):
        dataset.source[1]
    with pytest.raises(ConfigError, match="do not say how many classes they have: set num_classes"):
        said()


@pytest.mark.parametrize(("option", "value"), [("format", 2), ("moments", "mean_logvar")])
def test_latents_of_another_format_are_refused(said, option, value):
    with pytest.raises(DataError, match=rf"latents\.json says {option} = {value!r}, wanted"):
        said(classes=None, **{option: value})


def test_a_preparation_that_is_not_finished_is_named(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tfds dataset: its preparation is not finished"):
        make(str(tmp_path))
    (tmp_path / "latents.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tfds dataset: ") as error:
        make(str(tmp_path))
    assert "not finished" not in str(error.value)


@pytest.mark.parametrize("cached", ["features/", "dinov2", "feature/dinov2"])
def test_a_name_that_no_cached_output_has_is_refused(written, cached):
    with pytest.raises(ConfigError, match=rf"cached = '{cached}': wanted features/NAME or token/NAME"):
        make(written, cached=(cached,))


def test_more_classes_than_the_data_have_are_allowed(tmp_path):
    dataset = make(write(tmp_path, 2, label=tfds.features.ClassLabel(num_classes=8)), num_classes=10)
    assert dataset.space.conditions.classes == 10


def test_many_records_read_together_are_those_read_alone(written):
    source = make(written, mirror=True).source
    for one, many in zip([3, 0, 3, 19], source.__getitems__([3, 0, 3, 19]), strict=True):
        assert many["y"] == source[one]["y"]
        np.testing.assert_array_equal(many["moments"], source[one]["moments"])


def test_what_is_read_is_what_tfds_reads(tmp_path):
    directory = write(tmp_path, 4, more=PNG | CACHED)
    records = tfds.builder_from_directory(directory).as_data_source("train")
    source = make(directory, mirror=True, image=True, cached=tuple(CACHED)).source
    for index, wanted in enumerate(records):
        found = source[index]
        assert found.pop("y") == wanted.pop("label")
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_another_encoding_is_refused(tmp_path):
    feature = tfds.features.Tensor(shape=(8, 12, 3), dtype=np.uint8, encoding="zlib")
    directory = write(tmp_path, 2, more={"image": (feature, pixels)})
    with pytest.raises(DataError, match=r"image is stored as Tensor.*wanted Tensor\(encoding='bytes'\) or Image"):
        make(directory, image=True)


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


@pytest.mark.parametrize("image", [PNG, RAW], ids=["png", "raw"])
def test_image_and_cached_features_are_mirrored_with_the_moments(image, tmp_path):
    directory = write(tmp_path, 4, more=image | CACHED)
    asked = {"image": True, "cached": tuple(CACHED)}
    example = make(directory, **asked).source[2]
    np.testing.assert_array_equal(example["image"], pixels(2))
    assert {name: np.unique(example[name]).tolist() for name in ("moments", *CACHED)} == {
        "moments": [2],
        "features/dinov2": [2],
        "token/dinov2": [2],
    }
    dataset = make(directory, mirror=True, **asked)
    rng = np.random.default_rng(0)
    drawn = {False: 0, True: 0}
    for _ in range(20):
        example = dataset.transform(dataset.source[2], rng)
        mirrored = example["moments"][0, 0, 0] == 102
        drawn[bool(mirrored)] += 1
        np.testing.assert_array_equal(example["image"], pixels(2)[:, ::-1] if mirrored else pixels(2))
        for name in ("moments", *CACHED):
            assert np.unique(example[name]).tolist() == [102 if mirrored else 2], name
    assert min(drawn.values()) > 4
    with contextlib.closing(pipeline.batches(dataset, 4, seed=0)) as batches:
        batch = next(batches)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "moments": ((4, 4, 6, 4), np.float16),
        "y": ((4,), np.int32),
        "image": ((4, 8, 12, 3), np.uint8),
        "features/dinov2": ((4, 5, 3), np.float16),
        "token/dinov2": ((4, 3), np.float16),
    }


def test_what_is_not_asked_for_is_not_read(tmp_path):
    assert set(make(write(tmp_path, 2, more=PNG | CACHED)).source[0]) == {"moments", "y"}


@pytest.mark.parametrize(
    ("more", "asked", "message"),
    [
        ({}, {"image": True}, "no feature 'image', given: label, moments"),
        ({"image": both(8, 12)}, {"image": True}, "image is float16, wanted uint8"),
        (
            {"image": (tfds.features.Image(shape=(None, None, 3), encoding_format="png"), PNG["image"][1])},
            {"image": True},
            r"image has shape \(None, None, 3\), wanted",
        ),
        ({"token/a": both(5, 3)}, {"cached": ("token/a",)}, r"token/a has shape \(2, 5, 3\), wanted \(2, None\)"),
        ({}, {"cached": ("features/a",)}, "no feature 'features/a'"),
        ({}, {"cached": ("dinov2",)}, "cached = 'dinov2': wanted features/NAME or token/NAME"),
    ],
)
def test_what_does_not_fit_an_encoder_is_named(tmp_path, more, asked, message):
    directory = write(tmp_path, 2, more=more)
    with pytest.raises((ConfigError, DataError), match=message) as error:
        make(directory, **asked)
    assert one_line(error)


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
    with pytest.raises(
        DataError, match=rf"record 2 \(latents-train.*-00000-of-00001, number 2\): label {label} is not in"
    ):
        dataset.source[2]


WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]  # each imports jax


def flip_a_byte(shard):
    """In the middle of what is used of a shard."""
    content = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(bytes(content), np.uint8))
    content[used[len(used) // 2]] ^= 0xFF
    shard.write_bytes(content)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_damaged_record_is_an_error_that_names_it_or_is_replaced(tmp_path, workers):
    directory = write(tmp_path)
    with contextlib.closing(pipeline.batches(make(directory), 4, seed=0)) as batches:
        wanted = [next(batches)["y"] for _ in range(5)]  # one epoch
    (shard,) = tmp_path.rglob("*train.array_record*")
    flip_a_byte(shard)
    dataset, said = make(directory), []
    with (
        contextlib.closing(pipeline.batches(dataset, 20, seed=0, num_workers=workers)) as batches,
        pytest.raises(
            DataError, match=r"split train, record \d+ \(latents-train.*, number \d+\): RuntimeError: "
        ) as error,
    ):
        next(batches)
    assert error.value.exit_code == 65
    lenient = pipeline.batches(dataset, 4, seed=0, num_workers=workers, max_bad_records=20, report=said.append)
    with contextlib.closing(lenient) as batches:
        found = [next(batches)["y"] for _ in range(5)]
    changed = np.concatenate(found) != np.concatenate(wanted)
    assert 0 < changed.sum() <= len(said) < 20, "the order of the others is the same, and each that is bad is counted"


@pytest.mark.parametrize(
    ("workers", "kept"), [(0, 0.98), (0, 0.5), (0, 0), pytest.param(2, 0.5, marks=pytest.mark.slow)]
)
def test_a_shard_that_is_cut_off_is_an_error_that_names_it(tmp_path, workers, kept):
    dataset = make(write(tmp_path))
    (shard,) = tmp_path.rglob("*train.array_record*")
    os.truncate(shard, int(kept * shard.stat().st_size))
    with (
        contextlib.closing(pipeline.batches(dataset, 20, seed=0, num_workers=workers)) as batches,
        pytest.raises(DataError, match=r"record \d+ \(latents-train.array_record-00000-of-00001, number ") as error,
    ):
        next(batches)
    assert one_line(error)
    assert error.value.exit_code == 65


def test_what_latents_json_says_is_checked(written, tmp_path):
    path = shutil.copytree(written, tmp_path / "set")
    good = {"format": 1, "moments": "mean_std", "classes": list("abcdefghij"), "vae": {"scale": 0.18}}
    for change, words in [
        ([1], "wanted a JSON object"),
        (good | {"classes": 5}, "cannot be used: TypeError"),
        (good | {"vae": [1]}, "cannot be used: AttributeError"),
        (good | {"vae": {"scale": -1}}, "the scale of the autoencoder is -1"),
    ]:
        (path / "latents.json").write_text(json.dumps(change))
        with pytest.raises(DataError, match=words) as error:
            data.make("latents", "train", data_dir=str(path))
        assert "\n" not in str(error.value)
    (path / "latents.json").unlink()
    os.mkfifo(path / "latents.json")
    with pytest.raises(DataError, match="is not a regular file"):
        make(str(path))


def test_pixels_of_another_shape_than_the_metadata_say_are_named(tmp_path):
    image = tfds.features.Image(shape=(8, 12, 3), encoding_format="png")
    path = write(tmp_path / "a", count=2, more={"image": (image, lambda i: png(pixels(i)[: 8 - 2 * i]))})
    source = make(path, image=True).source
    assert source[0]["image"].shape == (8, 12, 3)
    with pytest.raises(DataError, match=r"record 1 .*: the stored pixels are \[6, 12, 3\], wanted \[8, 12, 3\]"):
        source[1]


def test_stored_images_are_decoded_as_images_alone(tmp_path):
    """tfds would let Pillow decode whatever it can, for EPS by starting Ghostscript."""
    feature = tfds.features.Image(shape=(8, 12, 3), encoding_format="png")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    path = write(tmp_path, count=2, more={"image": (feature, lambda i: png(pixels(i)) if i else eps)})
    source = make(path, image=True).source
    np.testing.assert_array_equal(source[1]["image"], pixels(1))
    with pytest.raises(DataError, match=r"record 0 .*: not an image that can be decoded: cannot identify"):
        source[0]

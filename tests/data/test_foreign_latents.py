"""Latents as others keep them: from every layout the same images give the same examples, and doubt is an error."""

import contextlib
import io
import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from diversedit_jax import data
from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import edm2, foreign_latents, pipeline
from diversedit_jax.errors import ConfigError, DataError, WeightsError
from diversedit_jax.weights.formats import numpy_pickle
from tests.weights.test_weights_file import mapping, op, storage, tensor, zipped

COUNT, K, H, W = 5, 4, 3, 6
LABELS = [2, 0, 1, 1, 0]


def moments(number: int, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) [k h w] of an image."""
    rng = np.random.default_rng([number, mirrored])
    mean, std = rng.standard_normal((K, H, W), np.float32), rng.uniform(0.1, 1, (K, H, W))
    return mean, std.astype(np.float32)


def stacked(number: int, kind: str = "std", mirrored: bool = False) -> np.ndarray:
    mean, std = moments(number, mirrored)
    return np.concatenate([mean, 2 * np.log(std) if kind == "logvar" else std])


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8 * H, 8 * W, 3), dtype=np.uint8)


def labelled(path, zip_file: bool = False, kind="std"):
    files = {f"00000/img-mean-std-{n:08d}.npy": npy(stacked(n, kind)) for n in range(COUNT)}
    files["dataset.json"] = json.dumps({"labels": list(zip(files, LABELS, strict=True))[::-1]}).encode()
    return packed(path, files, zip_file)


def packed(path, files, zip_file):
    if zip_file:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
        return path
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


def repa(path, zip_file=False, kind="std"):
    path.mkdir()
    ending = ".zip" if zip_file else ""
    labelled(path / f"vae-sd{ending}", zip_file, kind)
    packed(path / f"images{ending}", {f"00000/img{n:08d}.png": png(n) for n in range(COUNT)}, zip_file)
    return path


def database(path, protocol=4):
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as transaction:
        for n in range(COUNT):
            both = {"moments": stacked(n, "logvar"), "moments_flip": stacked(n, "logvar", True)}
            record = pickle.dumps(both | {"label": LABELS[n], "filename": f"{n}.JPEG"}, protocol)
            transaction.put(str(n).encode(), record)
        transaction.put(b"num_samples", str(COUNT).encode())
        transaction.put(b"created_at", b"today")
    return path


def torch_files(path, kind="std"):
    """As torch.save writes {"image": tensor, "label": int}."""
    for n in range(COUNT):
        path.mkdir(exist_ok=True)
        image = tensor((2 * K, H, W), (H * W, W, 1), where=storage(size=2 * K * H * W))
        body = mapping(image=image, label=op(LABELS[n]))
        zipped(path / f"{n}.pt", body, {"0": stacked(n, kind).tobytes()})
    return path


def shards(path):
    path.mkdir()
    both = [np.stack([moments(n, mirrored)[0] for n in range(COUNT)]) for mirrored in (False, True)]
    for name, rows in (("latents_rank00_shard000.safetensors", slice(0, 2)), ("shard001.safetensors", slice(2, 5))):
        arrays = {"latents": both[0][rows], "latents_flip": both[1][rows], "labels": np.int64(LABELS[rows])}
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path / name)
    mean, std = channel_statistics()
    zipped(
        path / "latents_stats.pt",
        mapping(mean=named("0", K), std=named("1", K)),
        {"0": mean.tobytes(), "1": std.tobytes()},
    )
    return path


def named(key: str, size: int) -> bytes:
    return tensor((1, K, 1, 1), (K, 1, 1, 1), where=storage(key, size))


def channel_statistics():
    return np.arange(K, dtype=np.float32), np.linspace(0.5, 2, K, dtype=np.float32)


# layout: (how it is written, options, whether it holds mirror images)
LAYOUTS = {
    "repa": (repa, {}, False),
    "repa-zip": (lambda path: repa(path, True), {}, False),
    "repa-logvar": (lambda path: repa(path, kind="logvar"), {"kind": "logvar"}, False),
    "edm2": (labelled, {}, False),
    "edm2-zip": (lambda path: labelled(path, True), {}, False),
    "meanflow_lmdb": (database, {"num_classes": 3}, True),
    "meanflow_pt": (torch_files, {"num_classes": 3}, False),
    "lightningdit": (shards, {}, True),
}


def expected(layout: str, number: int, mirrored: bool = False) -> np.ndarray:
    """Moments [h w 2k] in the network's space before scaling."""
    mean, std = (np.moveaxis(part, 0, -1) for part in moments(number, mirrored))
    if layout.startswith("edm2"):
        mean, std = (mean - np.float32(edm2.MEAN)) / np.float32(edm2.STD) / 2, std / np.float32(edm2.STD) / 2
    if layout == "lightningdit":
        shift, scale = channel_statistics()
        mean, std = (mean - shift) / scale, 0 * std
    return np.concatenate([mean, std], axis=-1)


def make(layout: str, path, **options):
    write, given, _ = LAYOUTS[layout]
    return data.make(layout.partition("-")[0], "train", data_dir=str(write(path)), **given | options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_examples(layout, tmp_path):
    dataset = make(layout, tmp_path / "set")
    assert (dataset.space, dataset.transform) == (Space((H, W, K), Conditions.labels(3)), None)
    assert dataset.scale == (1.0 if layout in ("edm2", "edm2-zip", "lightningdit") else 0.18215)
    sent = pickle.loads(pickle.dumps(dataset.source))  # as workers get it
    order = list(range(COUNT)) * 4
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(dataset.source.__getitem__, order), *pool.map(sent.__getitem__, order)]
    for number, example in zip(order * 2, found, strict=True):
        np.testing.assert_allclose(example["moments"], expected(layout, number), rtol=1e-5, atol=1e-6)
        assert (example["moments"].dtype, example["y"].dtype) == (np.float32, np.int32)
        assert example["y"] == LABELS[number]
        assert example.keys() == {"moments", "y"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mirror_images_are_drawn_or_refused(layout, tmp_path):
    if not LAYOUTS[layout][2]:
        with pytest.raises(ConfigError, match=r"this layout has no latents of mirror images; tools.prepare_latents"):
            make(layout, tmp_path / "set", mirror=True)
        return
    dataset = make(layout, tmp_path / "set", mirror=True)
    assert dataset.space.shape == (H, W, K)
    wanted = [expected(layout, 3, mirrored) for mirrored in (False, True)]
    count = [0, 0]
    for seed in range(40):
        drawn = dataset.transform(dataset.source[3], np.random.default_rng(seed))["moments"]
        which = [np.allclose(drawn, one, rtol=1e-5, atol=1e-6) for one in wanted]
        count[which.index(True)] += 1
    assert min(count) > 8


def every_example(layout, path, options):
    source = data.make(layout, "train", data_dir=str(path), **options).source
    return [source[number] for number in range(len(source))]


def refused(words, layout, path, error_kind=DataError, **options):
    with pytest.raises(error_kind, match=words) as error:
        every_example(layout, path, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zip_file", [False, True])
def test_repas_crops_are_read_beside_their_latents(zip_file, tmp_path):
    path = repa(tmp_path / "set", zip_file)
    source = data.make("repa", "train", data_dir=str(path), image=True).source
    for number in range(COUNT):
        np.testing.assert_array_equal(source[number]["image"], picture(number))
    if not zip_file:
        (path / "images/00000/img00000002.png").unlink()
        refused("has 5 latents, but 4 images", "repa", path, image=True)


@pytest.mark.parametrize(("layout", "write"), [("meanflow_pt", torch_files), ("meanflow_lmdb", database)])
def test_the_number_of_classes_is_not_assumed(layout, write, tmp_path):
    refused(r"do not say how many classes they have: set num_classes \(", layout, write(tmp_path / "set"), ConfigError)


def test_standard_deviations_are_not_guessed(tmp_path):
    path = repa(tmp_path / "set", kind="logvar")
    refused(r"a standard deviation of -\d.*: are these log variances\? Set kind='logvar'", "repa", path)
    refused("kind = 'var' is unknown; .*known: std, logvar", "repa", path, ConfigError, kind="var")
    other = r"log variances of at least 0.1\d*: are these standard deviations\? Set kind='std'"
    refused(other, "repa", repa(tmp_path / "plain"), kind="logvar")
    refused("are these log variances", "meanflow_pt", torch_files(tmp_path / "pt", "logvar"), num_classes=3)
    assert data.make(
        "meanflow_pt", "train", data_dir=str(tmp_path / "pt"), kind="logvar", num_classes=3
    ).space.shape == (H, W, K)


def test_log_variances_are_clipped_as_published():
    assert np.allclose(foreign_latents.deviations(np.float32([-100, 0, 100]), "logvar"), np.exp([-15, 0, 10]))


def test_what_is_missing_or_damaged_is_named(tmp_path):
    for layout in ("repa", "edm2"):
        path = repa(tmp_path / layout) if layout == "repa" else labelled(tmp_path / layout)
        folder = path / "vae-sd" if layout == "repa" else path
        (folder / "00000/img-mean-std-00000003.npy").write_bytes(b"\x93NUMPY")
        refused(rf"{layout}: .*{layout}, record 3: ", layout, path)
        (folder / "dataset.json").write_text("{}")
        refused("dataset.json cannot be read: KeyError: 'labels'", layout, path)
        (folder / "dataset.json").unlink()
        refused(r'has no dataset.json: \{"labels": \[\[file, class\], ...\]\}', layout, path)
        refused("does not exist", layout, tmp_path / "nowhere")
        refused("is not a path of this machine: mount the bucket", layout, "gs://bucket/set", ConfigError)
    refused("record 0: label 2 is not in 0 .. 1", "repa", repa(tmp_path / "labels"), num_classes=2)

    refused("nowhere is not such a database: .*No such file", "meanflow_lmdb", tmp_path / "nowhere")
    with lmdb.open(str(tmp_path / "other"), map_size=2**20) as env, env.begin(write=True) as transaction:
        transaction.put(b"0", b"")
    refused("is not such a database: no key 'num_samples'", "meanflow_lmdb", tmp_path / "other")

    path = torch_files(tmp_path / "pt")
    zipped(path / "2.pt", mapping(latent=op(1)))
    refused("record 2: 2.pt: wanted a dict with `image` and `label`", "meanflow_pt", path, num_classes=3)
    (path / "2.pt").write_bytes(b"")
    refused("record 2: .*2.pt", "meanflow_pt", path, num_classes=3)
    refused("is not a folder of .pt files", "meanflow_pt", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("it is empty", "meanflow_pt", tmp_path / "empty", num_classes=3)

    refused("has no .safetensors files", "lightningdit", tmp_path / "empty")
    path = shards(tmp_path / "shards")
    (path / "latents_stats.pt").unlink()
    refused("latents_stats.pt is missing; without it set normalise=False", "lightningdit", path)
    plain = data.make("lightningdit", "train", data_dir=str(path), normalise=False).source[4]
    np.testing.assert_array_equal(plain["moments"][..., :K], np.moveaxis(moments(4)[0], 0, -1))
    save_file({"latents": np.zeros((2, K, H, W), np.float32)}, path / "a.safetensors")
    refused("a.safetensors has no array labels, given: latents", "lightningdit", path)


class Attack:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [4, 5])  # the defaults of Python since 3.8 and since 3.14
def test_pickles_of_every_protocol_are_read_and_nothing_in_them_is_run(protocol, tmp_path):
    source = data.make(
        "meanflow_lmdb", "train", data_dir=str(database(tmp_path / "set", protocol)), num_classes=3
    ).source
    np.testing.assert_allclose(source[1]["moments"], expected("meanflow_lmdb", 1), rtol=1e-5)
    fortran = pickle.dumps({"a": np.asfortranarray(stacked(0)), "b": stacked(0).astype(">f4")}, protocol)
    for array in numpy_pickle.load(fortran).values():
        np.testing.assert_array_equal(array, stacked(0))
    sentinel = tmp_path / "sentinel"
    for value, words in [
        (Attack(sentinel.write_text, "x"), r"refuses to load (builtins.getattr|pathlib\S*)"),
        (Attack(eval, f"open({str(sentinel)!r}, 'w')"), "refuses to load builtins.eval"),
        (Attack(np.load, "file"), r"refuses to load numpy\S*load"),
        (np.array([Attack(print)], object), "refuses to load builtins.print|not of plain numbers"),
    ]:
        with pytest.raises(WeightsError, match=words):
            numpy_pickle.load(pickle.dumps({"moments": value}, protocol))
    assert not sentinel.exists()


FLOAT = b"cnumpy\ndtype\n" + op("f4") + b"\x85R"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "its pickle cannot be read"),
        (op([1]), "its pickle is of a list, wanted a dict"),
        (b"}r\xff\xff\xff\x7f", None),  # a place in the memo that would take 32 GB as an array of places
        (b"cnumpy\nndarray\n)R", "a call of _Name"),
        (b"}" + FLOAT + b"b", "a state of dict"),
        (b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcd" + FLOAT + op((9,)) + op("C") + b"tR", "of 4 bytes"),
        (b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcd" + FLOAT + op((1,)) + op("Z") + b"tR", "order"),
        (b"cnumpy\ndtype\n" + op("f4") + b"\x85Rcnumpy\ndtype\n" + op("<f4") + b"\x85R", "not of plain numbers"),
    ],
)
def test_a_pickle_that_lies_is_refused(body, words):
    content = b"\x80\x04" + body + b"."
    if words is None:
        assert numpy_pickle.load(content) == {}
        return
    with pytest.raises(WeightsError, match=words) as error:
        numpy_pickle.load(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_classes_every_label_is_0(layout, tmp_path):
    dataset = make(layout, tmp_path / "set", num_classes=0)
    assert dataset.space.conditions == Conditions.labels(0)
    assert [int(dataset.source[number]["y"]) for number in range(COUNT)] == [0] * COUNT


def test_moments_that_are_not_those_of_the_others_are_named(tmp_path):
    path = labelled(tmp_path / "set")
    (path / "00000/img-mean-std-00000002.npy").write_bytes(npy(stacked(2)[:, :2]))
    refused(r"record 2: moments \[2, 6, 8\], those of record 0 are \[3, 6, 8\]", "edm2", path)
    broken = stacked(2)
    broken[0, 0, 0] = np.nan
    (path / "00000/img-mean-std-00000002.npy").write_bytes(npy(broken))
    refused("record 2: moments that are not finite", "edm2", path)


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = labelled(tmp_path / "set.zip", True)
    content = bytearray(path.read_bytes())
    content[content.index(stacked(3).tobytes()) + 5] ^= 0xFF
    path.write_bytes(content)
    refused(r"record 3: 00000/img-mean-std-00000003.npy: damaged in the zip", "edm2", path)


def test_threads_share_the_directory_of_a_zip(tmp_path, monkeypatch):
    """Of an archive with a million members, each reading of it takes many seconds and most of a gigabyte."""
    source = make("edm2-zip", tmp_path / "set").source
    opened = []
    whole = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *given: opened.append(given) or whole(*given))
    sent = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sent.__getitem__, list(range(COUNT)) * 20))
        list(pool.map(source.__getitem__, list(range(COUNT)) * 20))
    assert len(opened) == 1, "the copy opens the archive once, the source has opened it before"


@pytest.mark.parametrize("zip_file", [False, True])
def test_a_set_without_labels_has_no_classes(zip_file, tmp_path):
    """As dataset_tool writes it for images without classes: {"labels": null}."""
    files = {f"00000/img-mean-std-{n:08d}.npy": npy(stacked(n)) for n in range(COUNT)}
    path = packed(tmp_path / "set", files | {"dataset.json": b'{"labels": null}'}, zip_file)
    dataset = data.make("edm2", "train", data_dir=str(path))
    assert (len(dataset.source), dataset.space.conditions, dataset.source[4]["y"]) == (COUNT, Conditions.labels(0), 0)
    np.testing.assert_allclose(dataset.source[4]["moments"], expected("edm2", 4), rtol=1e-5, atol=1e-6)
    refused("num_classes is 3, but dataset.json has no labels; 0 trains without", "edm2", path, num_classes=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_that_is_not_there_is_not_the_training_data(layout, tmp_path):
    path = make(layout, tmp_path / "set") and tmp_path / "set"
    with pytest.raises(ConfigError, match=r"no split 'test'; the only one is 'train'"):
        data.make(layout.partition("-")[0], "test", data_dir=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["edm2-zip", "meanflow_lmdb", "lightningdit"])
def test_worker_processes_read_the_same(layout, tmp_path):
    dataset = make(layout, tmp_path / "set", mirror=LAYOUTS[layout][2])
    with contextlib.closing(pipeline.batches(dataset, 4, seed=0)) as threads:
        wanted = [next(threads) for _ in range(2)]
    with contextlib.closing(pipeline.batches(dataset, 4, seed=0, num_workers=2)) as workers:
        for batch in wanted:
            given = next(workers)
            for name, array in batch.items():
                np.testing.assert_array_equal(given[name], array)


def test_arrays_of_lightningdit_that_do_not_fit_are_named(tmp_path):
    path = shards(tmp_path / "set")
    latents, labels = np.zeros((2, K, H, W), np.float32), np.int64([0, 1])
    for arrays, words in [
        ({"latents": np.zeros((), np.float32), "labels": labels}, r"wanted latents \[n k h w\] and labels \[n\]"),
        ({"latents": latents, "labels": labels[:1]}, r"wanted latents \[n k h w\] and labels \[n\]"),
        ({"latents": latents, "labels": labels * 2**40}, "label 1099511627776: wanted 0 .. 1048575"),
        ({"latents": latents, "labels": np.float32([0, 1])}, "labels: 'float' object"),
    ]:
        save_file(arrays, path / "a.safetensors")
        refused(words, "lightningdit", path)
    (path / "a.safetensors").unlink()
    mean, std = channel_statistics()
    for changed in (0 * std, np.full_like(std, np.nan)):
        storages = {"0": mean.tobytes(), "1": changed.tobytes()}
        zipped(path / "latents_stats.pt", mapping(mean=named("0", K), std=named("1", K)), storages)
        refused("wanted a finite mean and a standard deviation of 4 channels", "lightningdit", path)


@pytest.mark.parametrize("layout", ["repa", "edm2", "meanflow_lmdb", "meanflow_pt", "lightningdit"])
def test_pipes_are_refused(layout, tmp_path):
    """Reading one would wait until somebody writes."""
    write, options, _ = LAYOUTS[layout]
    path = write(tmp_path / "set")
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix not in (".png",) and file.name != "lock.mdb":
            content = file.read_bytes()
            file.unlink()
            os.mkfifo(file)
            with pytest.raises((DataError, WeightsError), match=r"not a regular file|is missing"):
                every_example(layout, path, options)
            file.unlink()
            file.write_bytes(content)


def test_a_truncated_database_is_refused(tmp_path):
    file = database(tmp_path / "set") / "data.mdb"
    file.write_bytes(file.read_bytes()[:20_000])
    refused("is not such a database: it is truncated: 20000 bytes", "meanflow_lmdb", file.parent, num_classes=3)

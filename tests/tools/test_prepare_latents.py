"""Preparing latents: whatever happens on the way, the set is that of an undisturbed run, and nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from diversedit_jax import data, encoders
from diversedit_jax.data import image_collections
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.models import vae, vit
from diversedit_jax.runtime.files import write_json
from diversedit_jax.weights import vae as published
from diversedit_jax.weights import vit as published_encoders
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests import ROOT
from tools import latent_shards, prepare_latents
from tools.prepare_latents import Options

ARCH = vae.Architecture(widths=(8, 16), layers=1, groups=4)
SIZE, PER_SHARD = 16, 8


def picture(number: int, side: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Twenty images of two classes, three of which cannot be read, and an autoencoder."""
    home = tmp_path_factory.mktemp("home")
    for number in range(20):
        folder = home / "images" / ("ant" if number < 12 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number:02d}.png")
    whole = (home / "images/ant/03.png").read_bytes()
    (home / "images/ant/03.png").write_bytes(whole[: len(whole) // 2])
    (home / "images/ant/07.png").write_bytes(b"")
    (home / "images/bee/13.png").write_text("<html>not found</html>")
    (home / "images/bee/notes.txt").write_text("")
    network = vae.network(ARCH)
    published.export(jax.jit(network.init)(jax.random.key(0)), ARCH, home / "vae", scale=0.5)
    return home


GOOD = [number for number in range(20) if number not in (3, 7, 13)]


def prepare(home, out, **options):
    given = {"vae": str(home / "vae"), "size": SIZE, "per_shard": PER_SHARD, "batch_size": 8} | options
    prepare_latents.prepare(home / "images", out, Options(**given))
    return out


def content(folder: Path) -> list[list[bytes]]:
    """The records of a finished set, shard by shard."""
    return [list(latent_shards.records(folder / shard["file"])) for shard in latent_shards.whole(folder)["shards"]]


@pytest.fixture(scope="module")
def straight(home):
    """The set of a run that nothing disturbed, with crops."""
    return prepare(home, home / "straight", image="png")


def test_the_set_holds_both_images_latents_and_trains(home, straight):
    dataset = data.make("latents", "train", data_dir=str(straight), mirror=True, image=True)
    assert (dataset.space.shape, dataset.space.conditions.classes, dataset.scale) == ((8, 8, 4), 2, 0.5)
    assert len(dataset.source) == len(GOOD)
    network, params = vae.network(ARCH), published.open_vae(home / "vae").read()
    encode = jax.jit(network.encode)
    for row, number in enumerate(GOOD):
        example = dataset.source[row]
        crop = image_collections.center_crop(picture(number), SIZE)
        np.testing.assert_array_equal(example["image"], crop)
        assert example["y"] == int(number >= 12)
        both = np.stack([crop, crop[:, ::-1]]).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(example["moments"], encode(params, both), rtol=2e-3, atol=2e-3)  # float16


def test_tfds_reads_the_set(straight):
    records = tfds.builder_from_directory(str(straight)).as_data_source("train")
    assert len(records) == len(GOOD)
    assert records[3] | {"moments": None, "image": None} == {
        "key": b"ant/04.png",
        "label": 0,
        "moments": None,
        "image": None,
    }
    assert records[3]["moments"].shape == (2, 8, 8, 8)


def test_the_report_names_every_image_that_is_not_there(straight):
    report = json.loads((straight / "report.json").read_text())
    assert (report["images"], report["records"], report["per_class"]) == (20, 17, {"ant": 10, "bee": 7})
    assert report["ignored"] == {"*.txt": 1}
    skipped = report["skipped"]
    assert set(skipped) == {"ant/03.png", "ant/07.png", "bee/13.png"}
    assert "Truncated" in skipped["ant/03.png"]
    assert skipped["ant/07.png"] == "an empty file"
    with Image.open(straight / "mosaic.png") as mosaic:
        assert mosaic.size == (8 * 96, 2 * 96)  # small images are shown six times as large
        first = np.asarray(mosaic)[:96:6, :96:6]
    np.testing.assert_array_equal(first, image_collections.center_crop(picture(0), SIZE))


def test_latents_json_says_how_it_was_made(home, straight):
    about = latent_shards.whole(straight)
    assert about["vae"] == {
        "name": "vae",
        "sha256": published.open_vae(home / "vae").digest,
        "scale": 0.5,
        "shift": 0.0,
    }
    found = {key: about[key] for key in ("moments", "shape", "classes", "resolution", "crop", "input_range", "records")}
    assert found == {
        "moments": "mean_std",
        "shape": [8, 8, 4],
        "classes": ["ant", "bee"],
        "resolution": SIZE,
        "crop": "adm",
        "input_range": [-1, 1],
        "records": 17,
    }


def test_processes_share_the_work_and_make_the_same_set(home, straight, tmp_path, capsys):
    for index in (2, 0, 1):
        assert not (tmp_path / "latents.json").exists()
        prepare(home, tmp_path, image="png", process_index=index, process_count=3)
    assert content(tmp_path) == content(straight)
    assert "2 of 3 shards are left to the others" in capsys.readouterr().out


def test_what_is_done_is_not_done_again(home, straight, tmp_path, monkeypatch):
    def breaks(folder, plan, shard, records, *counts):
        if shard == 1:
            next(iter(records))
            raise KeyboardInterrupt
        return write(folder, plan, shard, records, *counts)

    write = latent_shards.write_shard
    monkeypatch.setattr(latent_shards, "write_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare(home, tmp_path, image="png")
    with pytest.raises(DataError, match="its preparation is not finished: run the same command again"):
        latent_shards.whole(tmp_path)
    with pytest.raises(DataError, match="is not a tfds dataset: its preparation is not finished"):
        data.make("latents", "train", data_dir=str(tmp_path))
    first = (tmp_path / "latents-train.array_record-00000-of-00003").stat().st_mtime_ns
    monkeypatch.undo()
    prepare(home, tmp_path, image="png")
    assert (tmp_path / "latents-train.array_record-00000-of-00003").stat().st_mtime_ns == first
    assert content(tmp_path) == content(straight)


def test_a_whole_set_is_left_alone_and_another_is_refused(home, straight, tmp_path, capsys):
    before = (straight / "latents.json").stat().st_mtime_ns
    prepare(home, straight, image="png")
    assert "nothing to do" in capsys.readouterr().out
    assert (straight / "latents.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"holds a set with other settings \(.*image: 'png' there, 'jpeg' given"):
        prepare(home, straight, image="jpeg")
    with pytest.raises(ConfigError, match=r"holds a set with other settings \(.*per_shard: 8 there, 4 given"):
        prepare(home, straight, image="png", per_shard=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be used: .*Not a directory"):
        prepare(home, tmp_path / "file")


def test_the_batch_size_may_not_change_on_the_way(home, straight, tmp_path):
    """The last bits of the moments depend on it."""
    with pytest.raises(ConfigError, match=r"holds a set with other settings \(.*batch_size: 8 there, 4 given"):
        prepare(home, straight, image="png", batch_size=4)
    batches = [content(prepare(home, tmp_path / str(size), image="png", batch_size=size)) for size in (8, 8)]
    assert batches[0] == batches[1] == content(straight)


def test_a_mount_that_fails_ends_the_run_and_skips_no_image(home, straight, tmp_path, monkeypatch):
    read, broken = image_collections.read_file, True

    def fails(folder, keys, index):
        if broken and index >= 10:
            raise OSError(107, "Transport endpoint is not connected")
        return read(folder, keys, index)

    monkeypatch.setattr(image_collections, "read_file", fails)
    with pytest.raises(
        DataError, match=r"ant/1\d.png: .*Transport endpoint .*; once it is fixed, run the same command again"
    ):
        prepare(home, tmp_path, image="png")
    broken = False
    prepare(home, tmp_path, image="png")
    assert content(tmp_path) == content(straight)


def test_what_is_raised_while_encoding_is_no_fault_of_the_disk(home, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "device_get", full)
    with pytest.raises(ConfigError, match="--batch_size=8: the memory of the devices is too small"):
        prepare(home, tmp_path)


def test_without_any_good_image_the_report_says_why(home, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 images could be read; see report.json"):
        prepare_latents.prepare(tmp_path / "images", tmp_path / "out", Options(str(home / "vae"), size=SIZE))
    assert json.loads((tmp_path / "out/report.json").read_text())["skipped"] == {"a.png": "an empty file"}


def test_two_that_write_one_shard_do_not_harm_it(tmp_path):
    """The same command was started twice by mistake, and the first one is stopped when the other is done."""
    features = latent_shards.features((1, 1, 1), 8, None, {}, ())
    plan = latent_shards.Plan({}, features, 2, 2)
    latent_shards.claim(tmp_path, plan)
    example = {"moments": np.ones((2, 1, 1, 2), np.float16), "label": 0, "key": "a"}

    def overtaken(end):
        yield example
        latent_shards.write_shard(tmp_path, plan, 0, [example] * 2, {})
        yield from end

    def stopped():
        raise KeyboardInterrupt
        yield

    for end, error in [(stopped(), KeyboardInterrupt), ([example], DataError)]:
        with pytest.raises(error, match="No such file" if error is DataError else None):
            latent_shards.write_shard(tmp_path, plan, 0, overtaken(end), {})
        assert latent_shards.missing(tmp_path, plan) == []
        assert len(list(latent_shards.records(tmp_path / plan.file(0)))) == 2


def test_two_plans_that_claim_a_folder_together_do_not_mix(tmp_path, monkeypatch):
    """Both find no plan there. The last one to write its own has the folder."""
    features = latent_shards.features((1, 1, 1), 8, None, {}, ())
    first, last = (latent_shards.Plan({"size": size}, features, 1, 1) for size in (8, 16))
    write_json = latent_shards.write_json

    def overtaken(path, content):
        monkeypatch.undo()
        write_json(path, content)
        write_json(path, last.content)

    monkeypatch.setattr(latent_shards, "write_json", overtaken)
    assert not latent_shards.claim(tmp_path, first)
    with pytest.raises(ConfigError, match="size: 16 there, 8 given"):
        latent_shards.write_shard(tmp_path, first, 0, [], {"a": "no image"})
    assert latent_shards.missing(tmp_path, last) == [0]
    latent_shards.write_shard(tmp_path, last, 0, [], {"a": "no image"})


def test_what_cannot_work_is_said_at_once(home, tmp_path):
    for options, words in [
        ({"size": 15}, "--size = 15: must be a positive multiple of 2, the pixels of a latent"),
        ({"batch_size": 0}, "--batch_size = 0: must be at least 1"),
        ({"process_index": 1}, "--process_index = 1: must be at least 0 and at most 0"),
        ({"encoder": ("dinov2",)}, "--encoder=dinov2: wanted NAME=FILE"),
    ]:
        with pytest.raises(ConfigError, match=words):
            prepare(home, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"ant/03.png: .*Truncated"):
        prepare(home, tmp_path / "out", strict=True)


def test_without_classes_every_label_is_the_null_label(home, tmp_path):
    prepare(home, tmp_path, unconditional=True)
    dataset = data.make("latents", "train", data_dir=str(tmp_path))
    assert dataset.space.conditions.classes == 0
    assert {int(dataset.source[i]["y"]) for i in range(len(dataset.source))} == {0}


def small_encoder(folder: Path) -> Path:
    """A DINOv2 for 16 pixels, which has 16 patches of 4 pixels and 2 heads."""
    arch = vit.Architecture(depth=1, width=8, heads=2, hidden=16, patch=4, channels=3, side=4, layer_scale=True)
    params = jax.jit(vit.network(arch).init)(jax.random.key(0))
    file = folder / "encoder.safetensors"
    write_safetensors(file, published_encoders.export(jax.device_get(params), "original", arch))
    return file


def test_features_of_encoders_are_stored(home, tmp_path):
    file = small_encoder(tmp_path)
    with pytest.raises(ConfigError, match="the number of heads cannot be read from arrays of width 8"):
        prepare(home, tmp_path / "out", encoder=(f"dinov2={file}",))
    out = prepare(home, tmp_path / "out", encoder=(f"dinov2={file},heads=2,side=16",))
    cached = ("features/dinov2", "token/dinov2")
    dataset = data.make("latents", "train", data_dir=str(out), mirror=True, cached=cached)
    one = encoders.make("dinov2", file=str(file), heads=2, side=16)
    crop = image_collections.center_crop(picture(GOOD[5]), SIZE)
    patches, token = jax.jit(one.apply)(one.init(), np.stack([crop, crop[:, ::-1]]))
    example = dataset.source[5]
    np.testing.assert_allclose(example["features/dinov2"], patches, rtol=2e-3, atol=2e-3)  # float16
    np.testing.assert_allclose(example["token/dinov2"], token, rtol=2e-3, atol=2e-3)
    assert not np.allclose(patches[0], patches[1], atol=1e-2)


def wrong(folder: Path, words: str):
    with pytest.raises(DataError, match=words) as error:
        list(latent_shards.verify(folder))
    assert "\n" not in str(error.value)


def test_verification_finds_what_is_wrong(home, tmp_path, capsys):
    out = prepare(home, tmp_path / "set")
    prepare_latents.verify(out, None, "highest")
    assert "is whole: 17 records in 3 shards" in capsys.readouterr().out
    shard = out / "latents-train.array_record-00001-of-00003"
    whole = shard.read_bytes()
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    damaged = bytearray(whole)
    damaged[used[len(used) // 2]] ^= 0x10
    shard.write_bytes(damaged)
    wrong(out, r"00001-of-00003, record \d+: ")
    shard.unlink()
    wrong(out, r"00001-of-00003")
    about = latent_shards.whole(out)
    shard.write_bytes(whole)
    records = about["shards"][1]["records"]
    for change, words in [
        ({"records": records + 1}, rf"00001-of-00003 has {records} records, latents.json says {records + 1}"),
        ({"sha256": "0"}, r"00001-of-00003: the checksum differs"),
    ]:
        shards = [about["shards"][0], about["shards"][1] | change, about["shards"][2]]
        write_json(out / "latents.json", about | {"shards": shards})
        wrong(out, words)
    write_json(out / "latents.json", about | {"shape": [4, 4, 4]})
    wrong(out, r"00000-of-00003, record 0: 1024 moments, wanted \[2, 4, 4, 8\]")
    write_json(out / "latents.json", about | {"classes": ["ant"]})
    wrong(out, r"00001-of-00003, record \d+: label 1 is not in 0 .. 0")


def readable(shard: Path, number: int) -> bool:
    reader = ArrayRecordReader(str(shard), "readahead_buffer_size:0,max_parallelism:0")
    try:
        return bool(reader.read([number]))
    except Exception:  # array_record raises several kinds
        return False
    finally:
        reader.close()


def test_verification_names_the_record(tmp_path):
    """Records are read many at a time; which of them is damaged is said all the same."""
    features = latent_shards.features((4, 4, 4), 8, None, {}, ())
    plan = latent_shards.Plan({"shape": [4, 4, 4], "classes": None, "vae": {}, "image": None}, features, 100, 100)
    latent_shards.claim(tmp_path, plan)
    rng = np.random.default_rng(0)
    examples = [
        {"moments": rng.uniform(0.5, 1, (2, 4, 4, 8)).astype(np.float16), "label": 0, "key": str(number)}
        for number in range(100)
    ]
    latent_shards.write_shard(tmp_path, plan, 0, examples, {})
    about = latent_shards.finish(tmp_path, plan)
    assert list(latent_shards.verify(tmp_path)) == [100]
    shard = tmp_path / plan.file(0)
    whole = shard.read_bytes()
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    damaged = bytearray(whole)
    damaged[used[int(0.77 * len(used))]] ^= 0x10
    shard.write_bytes(damaged)
    (bad,) = [number for number in range(100) if not readable(shard, number)]
    assert bad % 64, "the first of those that are read together would be named anyway"
    wrong(tmp_path, f"00000-of-00001, record {bad}: ")
    shard.write_bytes(whole)
    info = (tmp_path / "dataset_info.json").read_text()
    assert info.count('"100"') == 1
    (tmp_path / "dataset_info.json").write_text(info.replace('"100"', '"99"'))
    wrong(tmp_path, "dataset_info.json and latents.json differ in the numbers of records")
    write_json(tmp_path / "latents.json", {"records": about["records"]})
    wrong(tmp_path, "latents.json cannot be read: it has no 'shape'")


def test_verification_decodes_some_records_beside_their_crops(home, straight, tmp_path, capsys):
    prepare_latents.verify(straight, home / "vae", "highest")
    assert "PSNR of the reconstructions of 8 images: " in capsys.readouterr().out
    with Image.open(straight / "verified.png") as found, Image.open(straight / "mosaic.png") as wanted:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    network = vae.network(ARCH)
    published.export(jax.jit(network.init)(jax.random.key(1)), ARCH, tmp_path / "other", scale=0.5)
    with pytest.raises(ConfigError, match=r"other is not the autoencoder that made .*: the checksum differs"):
        prepare_latents.verify(straight, tmp_path / "other", "highest")


def test_moments_of_another_kind_are_refused(home, tmp_path):
    out = prepare(home, tmp_path)
    about = latent_shards.whole(out)
    write_json(out / "latents.json", about | {"moments": "mean_logvar"})
    with pytest.raises(DataError, match="says moments = 'mean_logvar', wanted 'mean_std'"):
        data.make("latents", "train", data_dir=str(out))


def command(home, out):
    arguments = [home / "images", out, f"--vae={home / 'vae'}", "--size=16", "--per_shard=2", "--batch_size=2"]
    return [sys.executable, "-m", "tools.prepare_latents", *map(str, arguments), "--image=png"]


def undisturbed(command):
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


def killed_and_run_again(home, tmp_path, kills: int, command=command):
    undisturbed(command(home, tmp_path / "straight"))
    rng, out, died = random.Random(0), tmp_path / "killed", 0
    while died < kills:
        process = subprocess.Popen(command(home, out), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        begin = time.monotonic()
        # at a random moment of the work: between two shards, or within one
        while not (out / "notes").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "latents.json").exists():  # it was faster: begin once more
            assert time.monotonic() > begin
            os.rename(out, tmp_path / f"faster-{died}-{begin}")
        died += 1
    undisturbed(command(home, out))
    assert content(out) == content(tmp_path / "straight")
    left = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert left == [], "something half-written stays"


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_set(home, tmp_path):
    killed_and_run_again(home, tmp_path, kills=1)


@pytest.mark.slow
def test_killed_ten_times_it_ends_in_the_same_set(home, tmp_path):
    killed_and_run_again(home, tmp_path, kills=10)


def test_errors_are_one_line(home, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "tools.prepare_latents", str(home / "images"), str(tmp_path), "--vae=gs://bucket/vae"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 78
    assert run.stderr.startswith("error: --vae: gs://bucket/vae is not a path of this machine")
    assert run.stderr.count("\n") == 1

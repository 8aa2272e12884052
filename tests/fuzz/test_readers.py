"""Files from outside, damaged in thousands of ways: each is read as it was, or refused in one line.

Never a traceback, a hang, a crash, memory beyond the limit, or a program or module that a file names. Where a file has
checksums, changed bytes never change what is read. `readers.py` has the readers and their limits.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from diversedit_jax.configs import digits
from tests import DATA, ROOT
from tests.data import (
    test_captioned_latents,
    test_captions,
    test_foreign_latents,
    test_image_collections,
    test_in_memory,
    test_latents,
    test_videos,
    test_volumes,
)
from tests.evaluation import test_feature_cache, test_image_files, test_reference_statistics
from tests.fuzz.readers import READERS
from tests.models import test_inception
from tests.weights import test_flax_msgpack, test_weights_file, test_weights_folder
from tools import latent_shards

SEED = 0
EACH = 120  # damaged inputs of each reader: more than 4,000 in all
FEWER = {"orbax": 60, "autoencoder": 40}  # they are slow


def copied(source):
    def make(path):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path)

    return make


def pictures(path):
    """An image of each format."""
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        file = path / "class" / f"a.{kind.lower()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(test_image_collections.encoded(test_image_collections.picture(0), kind))


def indexed(path):
    test_image_collections.folder(path)
    labels = [[name, label] for label, name in enumerate(test_image_collections.ITEMS)]
    (path / "dataset.json").write_text(json.dumps({"labels": labels}))


def latents(path):
    written = test_latents.write(path.parent / "made", count=6, more=test_latents.PNG | test_latents.CACHED)
    shutil.move(written, path)
    shutil.rmtree(path.parent / "made")
    about = {"format": 1, "moments": "mean_std", "classes": list("abcdefghij"), "vae": {"scale": 0.18}}
    (path / "latents.json").write_text(json.dumps(about))


def shards(path):
    """As tools.prepare_latents writes them, in two shards."""
    about = {"format": 1, "moments": "mean_std", "shape": [4, 6, 2], "classes": ["a", "b"], "image": "png"}
    about |= {"vae": {"name": "vae", "sha256": "0" * 64, "scale": 0.18}}
    plan = latent_shards.Plan(about, latent_shards.features((4, 6, 2), 8, "png", {}, ("a", "b")), 4, 2)
    latent_shards.claim(path, plan)
    picture = test_image_collections.encoded(test_image_collections.picture(0, (8, 8)))
    for shard in range(plan.shards):
        records = [
            {"moments": np.full((2, 4, 6, 4), 1 + i, np.float16), "key": str(i), "label": i % 2, "image": picture}
            for i in plan.images(shard)
        ]
        latent_shards.write_shard(path, plan, shard, records, {})
    latent_shards.finish(path, plan)


def clips(path):
    """A video of each format, and one of frames."""
    path = path / "class"
    for number, suffix in enumerate(test_videos.LOSSLESS):
        test_videos.write(path / f"{number}{suffix}", test_videos.frames(0, 6))
    for suffix in test_videos.videos.PICTURES:
        test_videos.moving_picture(path / f"a{suffix}", test_videos.frames(0, 6))
    test_videos.folder_of_frames(path / "b", test_videos.frames(0, 6))


def clips_in_tar(path):
    members = {f"c/{number}.png": test_videos.png(frame) for number, frame in enumerate(test_videos.frames(0, 6))}
    members |= {"a.mp4": test_videos.write(path.parent / "made" / "a.mp4", test_videos.frames(0, 6)).read_bytes()}
    shutil.rmtree(path.parent / "made")
    test_videos.tar(path / "0.tar", members | {"a.cls": b"1", "c.json": b'{"label": 0}'})


def video_shards(path):
    """As tools.prepare_latents writes them: a video of two clips, and one of one clip."""
    about = {"format": 1, "moments": "mean_std", "shape": [3, 4, 6, 2], "classes": ["a"], "image": None, "video": True}
    about |= {"vae": {"name": "vae", "sha256": "0" * 64, "scale": 0.18}}
    plan = latent_shards.Plan(about, latent_shards.features((3, 4, 6, 2), 8, None, {}, ("a",)), 2, 2, "videos")
    latent_shards.claim(path, plan)
    keys = ("a#0", "a#1", "b#0")
    records = [
        {"moments": np.full((2, 3, 4, 6, 4), i + 1, np.float16), "key": k, "label": 0} for i, k in enumerate(keys)
    ]
    latent_shards.write_shard(path, plan, 0, records, {}, {"videos_read": 2})
    latent_shards.finish(path, plan)


def photographs(path):
    path.mkdir()
    for name in test_in_memory.cifar10.SPLITS["train"]:
        (path / name).write_bytes(test_in_memory.photographs(test_in_memory.COUNT)[0])


def small_tree():
    return {"net": {"a": np.arange(40, dtype=np.float32).reshape(4, 10), "b": np.int64([1, 2])}, "step": np.int32(3)}


def attack(path):
    """A file with an object beside its weights that would run a program."""
    body = test_weights_file.attacks(path)["posix.system"]
    mapping, tensor = test_weights_file.mapping, test_weights_file.tensor
    test_weights_file.zipped(path, mapping(ema=mapping(w=tensor()), other=body))


def split_weights(path):
    arrays = {f"block.{i}.weight": np.full((3, i + 1), i, np.float32) for i in range(4)}
    test_weights_folder.parts(path, arrays, _class_name="DiTTransformer2DModel", num_attention_heads=4)


def graph(path):
    arrays = {f"a{i}": np.full((2, i + 1), i, np.float32) for i in range(3)}
    test_inception.graph(path, *(test_inception.constant(name, array) for name, array in arrays.items()))


def feature_parts(path):
    test_feature_cache.feature_cache.claim(path, {"num": 10})
    for first in test_feature_cache.FIRSTS:
        shown = test_feature_cache.IMAGES[first : first + 4]
        part = test_feature_cache.part(len(shown))
        test_feature_cache.feature_cache.write(path, first, part, shown, {first: shown[0]})


def scores(path):
    path.mkdir()
    record = {"plan": {"num": 10}, "scores": {"fid": 3.5, "is": 200.0}, "seconds": 3}
    (path / "scores.json").write_text(json.dumps(record))


def config(path):
    path.mkdir()
    (path / "config.json").write_text(digits.get_config().to_json())


def run(path):
    images = {"kind": "run", "step": 8, "sampler": {"steps": 2}}
    (path / "evaluations" / "8").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"sampler": {"steps": 2, "solver": "euler"}}))
    record = {"plan": {"images": images}, "scores": {"fid": 3.5}}
    (path / "evaluations" / "8" / "scores.json").write_text(json.dumps(record))
    (path / "metrics.jsonl").write_text('{"step": 4, "scores/fid": 9.0, "time": 1}\n{"step": 8, "scores/fid": 8.0}\n')


def moved(make):
    """A maker that chooses the name in a folder: its file or folder becomes the path."""

    def made(path):
        (path.parent / "making").mkdir()
        written = make(path.parent / "making")
        shutil.move(written, path.with_suffix(Path(written).suffix) if Path(written).is_file() else path)
        shutil.rmtree(path.parent / "making", ignore_errors=True)

    return made


layouts = test_foreign_latents.LAYOUTS
MAKERS = {
    "images": pictures,
    "images indexed": indexed,
    "images zip": moved(lambda path: test_image_collections.zipped(path / "set")),
    "images tar": test_image_collections.tar,
    "images tar json": lambda path: test_image_collections.tar(path, "json"),
    "images tfds": test_image_collections.imagenet,
    "videos": clips,
    "videos tar": clips_in_tar,
    "captions coco": test_captions.coco,
    "captions csv": test_captions.table,
    "captions jsonl": test_captions.jsonl,
    "captions tar": test_captions.tar,
    "captions text": test_captions.beside,
    "tokenizer": copied(DATA / "clip_tokenizer"),
    "latents": latents,
    "latents verified": shards,
    "latents of videos": video_shards,
    "latents with captions": test_captioned_latents.shards,
    "uvit": test_captioned_latents.uvit,
    **{name: layouts[name][0] for name in ("repa", "repa-zip", "meanflow_lmdb", "meanflow_pt", "lightningdit")},
    "cifar10": photographs,
    "edm2-zip": lambda path: test_foreign_latents.labelled(path.with_suffix(".zip"), True),
    "volumes": test_volumes.write,
    "torch zip": copied(DATA / "weights_zip.pt"),
    "torch legacy": copied(DATA / "weights_legacy.pt"),
    "torch attack": attack,
    "safetensors": lambda path: test_weights_file.write_safetensors(path, test_weights_file.WANTED),
    "flax": lambda path: path.write_bytes(serialization.msgpack_serialize(small_tree())),
    "parts with an index": split_weights,
    "orbax": lambda path: ocp.PyTreeCheckpointer().save(path, small_tree()),
    "graph": graph,
    "release": copied(DATA / "official_sit.safetensors"),
    "release flax": test_flax_msgpack.msgpack,
    "autoencoder": copied(DATA / "vae"),
    "encoder": copied(DATA / "dinov2.safetensors"),
    "reference adm": moved(test_reference_statistics.adm),
    "reference ours": moved(test_reference_statistics.ours),
    "reference edm2": moved(test_reference_statistics.edm2),
    "samples npz": moved(test_image_files.stored),
    "samples compressed": moved(test_image_files.compressed),
    "samples npy": moved(test_image_files.npy),
    "feature parts": feature_parts,
    "scores": scores,
    "config": config,
    "run": run,
}


def findings(name, folder, first, count):
    """The endings of the damaged inputs, by kind, and those that must not be."""
    MAKERS[name](folder / "input")
    command = [sys.executable, "-m", "tests.fuzz.readers", name, str(folder), *map(str, (SEED, first, count))]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    bad, last, endings = [], {}, Counter()
    for line in lines:
        last |= line
        if "end" in line:
            endings[line["end"].partition(" ")[0]] += 1
            if line["end"] not in ("read", "changed", "refused"):
                bad.append(dict(last))
    if process.returncode != 0:
        bad.append({**last, "end": f"DIED with {process.returncode}: {process.stderr[-500:]}"})
    assert bad or endings.total() == count
    return endings, bad


def test_every_reader_has_its_files():
    assert MAKERS.keys() == READERS.keys()
    assert sum(FEWER.get(name, EACH) for name in READERS) > 3_000


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_as_they_were_or_refused(name, tmp_path):
    endings, bad = findings(name, tmp_path, 0, FEWER.get(name, EACH))
    assert not bad, "\n".join(map(str, bad))
    lenient = ("run", "captions text")  # analysis and image folders leave out what cannot be read
    assert endings["refused"] > 10 or name in lenient, endings


@pytest.mark.parametrize("name", ["edm2-zip", "torch zip"])
def test_a_few_damaged_files_are_read_as_they_were_or_refused(name, tmp_path):
    endings, bad = findings(name, tmp_path, 10_000, 60)
    assert not bad, "\n".join(map(str, bad))
    assert endings["refused"] > 10, endings

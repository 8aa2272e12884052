"""Every reader of files from outside, and a process that reads damaged ones within limits of memory and time.

    python -m tests.fuzz.readers NAME FOLDER SEED FIRST COUNT

It prints a line of JSON for each damaged input: its number, what was done, how it ended, seconds.
"""

import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from diversedit_jax.errors import MachineError, RunError
from tests.fuzz.mutations import damage

SECONDS = 20
# What runs a program or opens a connection. Modules that a file may name begin with "planted".
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn", "socket.connect")


class Reader(NamedTuple):
    """read: path -> what the file says, as a tree of arrays and plain values.

    sealed: a checksum covers all values, so changed bytes never change them.
    mib: limit of memory above that of the process before it reads.
    """

    read: Callable[[Path], Any]
    sealed: bool = False
    mib: int = 256


def images(path: Path) -> Any:
    from diversedit_jax.data import image_collections

    found = image_collections.open_images(path)
    return {key: (int(found.labels[i]), image_collections.crop(found, i, 8)) for i, key in enumerate(found.keys)}


def videos(path: Path) -> Any:
    from diversedit_jax.data import videos

    found, sampling = videos.open_videos(path), videos.Sampling(2, 2)
    return {key: (int(found.labels[i]), videos.clips(found, i, sampling, 8)) for i, key in enumerate(found.keys)}


def captions(path: Path) -> Any:
    from diversedit_jax.data.captions import open_captioned

    found = open_captioned(path)
    return dict(zip(found.images.keys, found.texts, strict=True)), found.missing, found.left_out, found.images.ignored


def tokenizer(path: Path) -> Any:
    from diversedit_jax.data.clip_tokenizer import open_tokenizer

    return open_tokenizer(path)(["a cat", "the 🐱"]).ids


def latents(name: str, **options: Any) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        from diversedit_jax import data

        dataset = data.make(name, "train", data_dir=str(path), **options)
        space = dataset.space.shape, dataset.space.conditions.classes, dataset.scale
        return space, [dataset.source[i] for i in range(min(len(dataset.source), 32))]

    return read


def photographs(path: Path) -> Any:
    from diversedit_jax.data import cifar10

    with mock.patch.object(cifar10, "COUNT", 6):
        return latents("cifar10")(path)


def verified(path: Path) -> Any:
    from tools import latent_shards

    return list(latent_shards.verify(path)), latents("latents", image=True, mirror=True)(path)[1]


def verified_videos(path: Path) -> Any:
    from tools import latent_shards

    return list(latent_shards.verify(path)), latents("latents", mirror=True)(path)


def weights(path: Path) -> Any:
    from diversedit_jax.weights.formats.weights_file import open_weights

    with open_weights(path) as file:
        return dict(file)


def weights_folder(path: Path) -> Any:
    from diversedit_jax.weights.formats import weights_folder

    with weights_folder.opened(path) as file:
        return dict(file), weights_folder.config(path)


def orbax(path: Path) -> Any:
    from diversedit_jax.weights.formats.orbax_folder import OrbaxFolder

    return dict(OrbaxFolder(path))


def graph(path: Path) -> Any:
    from diversedit_jax.weights.formats.tf_graph import open_graph

    file = open_graph(path)
    return {name: file.shapes[name] if file[name].size > 2**20 else file[name] for name in file}


def release(family: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        from diversedit_jax.weights import dit

        return dit.open_release(path, family, heads=4)[0].params

    return read


def autoencoder(path: Path) -> Any:
    from diversedit_jax.weights import vae

    return vae.open_vae(path).read()


def encoder(path: Path) -> Any:
    from diversedit_jax.encoders import dinov2
    from diversedit_jax.weights import vit

    return vit.open_encoder(dinov2.KIND, path, heads=4).read()


def reference(path: Path) -> Any:
    from diversedit_jax.evaluation.reference_statistics import open_reference

    found = open_reference(path)
    return dict(found.by_network), found.images and found.images.read(0, 100)


def samples(path: Path) -> Any:
    from diversedit_jax.evaluation import image_files

    return image_files.open_samples(path).read(0, 100)


def parts(path: Path) -> Any:
    from diversedit_jax.evaluation import feature_cache

    feature_cache.claim(path, {"num": 10})
    return list(feature_cache.features(path, [0, 4, 8], "toy")), feature_cache.shown(path, [0, 4, 8])


def scores(path: Path) -> Any:
    from diversedit_jax import evaluate

    return evaluate.finished(path, {"num": 10})


def config(path: Path) -> Any:
    from diversedit_jax import config as configs

    return configs.load(path).to_dict()


def run(path: Path) -> Any:
    from diversedit_jax.analysis import known_scores

    return known_scores.found(path)


READERS = {
    "images": Reader(images, mib=1536),
    "images indexed": Reader(images, mib=1536),
    "images zip": Reader(images, sealed=True, mib=1536),
    "images tar": Reader(images, mib=1536),
    "images tar json": Reader(images, mib=1536),
    "images tfds": Reader(images, mib=1536),
    "videos": Reader(videos, mib=1536),
    "videos tar": Reader(videos, mib=1536),
    "captions coco": Reader(captions),
    "captions csv": Reader(captions),
    "captions jsonl": Reader(captions),
    "captions tar": Reader(captions),
    "captions text": Reader(captions),
    "tokenizer": Reader(tokenizer),
    "latents": Reader(
        latents("latents", image=True, mirror=True, cached=("features/dinov2", "token/dinov2")), mib=1536
    ),
    "latents verified": Reader(verified, sealed=True, mib=1536),
    "latents of videos": Reader(verified_videos, sealed=True, mib=1536),
    "latents with captions": Reader(verified, sealed=True, mib=1536),
    "uvit": Reader(latents("uvit", kind="logvar", image=True), mib=1536),
    "repa": Reader(latents("repa", image=True), mib=1536),
    "repa-zip": Reader(latents("repa"), sealed=True),
    "edm2-zip": Reader(latents("edm2"), sealed=True),
    "meanflow_lmdb": Reader(latents("meanflow_lmdb", num_classes=3, mirror=True)),
    "meanflow_pt": Reader(latents("meanflow_pt", num_classes=3), sealed=True),
    "cifar10": Reader(photographs),
    "lightningdit": Reader(latents("lightningdit", mirror=True)),
    "volumes": Reader(latents("volumes", mirror=(0,))),
    "torch zip": Reader(weights, sealed=True),
    "torch legacy": Reader(weights),
    "torch attack": Reader(weights),
    "safetensors": Reader(weights),
    "flax": Reader(weights),
    "parts with an index": Reader(weights_folder),
    "orbax": Reader(orbax),
    "graph": Reader(graph),
    "release": Reader(release("official_sit")),
    "release flax": Reader(release("meanflow")),
    "autoencoder": Reader(autoencoder),
    "encoder": Reader(encoder),
    "reference adm": Reader(reference, sealed=True),
    "reference ours": Reader(reference, sealed=True),
    "reference edm2": Reader(reference),
    "samples npz": Reader(samples, sealed=True),
    "samples compressed": Reader(samples, sealed=True),
    "samples npy": Reader(samples),
    "feature parts": Reader(parts, sealed=True),
    "scores": Reader(scores),
    "config": Reader(config),
    "run": Reader(run),
}


def values(tree: Any, name: str = "") -> Iterator[tuple[str, bytes]]:
    """What a reader gave, leaf by leaf, as bytes that can be compared."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from values(value, f"{name}/{key}")
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from values(value, f"{name}/{key}")
    elif isinstance(tree, np.ndarray | np.generic):
        yield name, f"{tree.dtype} {tree.shape}".encode() + tree.tobytes()
    else:
        yield name, repr(tree).encode()


def verdict(reader: Reader, path: Path, whole: Mapping[str, bytes], plain: bool) -> str:
    """How reading ends: read, changed, refused; or a finding, in words."""
    try:
        found = dict(values(reader.read(path)))
    except MachineError as error:
        return f"MEMORY {error}"
    except RunError as error:
        text = str(error)
        return "refused" if text and text.isprintable() and len(text) < 2000 else f"WORDS {text!r:.300}"
    except BaseException as error:
        return f"TRACEBACK {type(error).__name__}: {error!s:.200}"
    if found == whole:
        return "read"
    wrong = [name for name, value in found.items() if whole.get(name) != value]
    return f"MISREAD {wrong[:3]}" if reader.sealed and plain and wrong else "changed"


def watch(event: str, args: tuple) -> None:
    """End the process that runs something which a file names."""
    if event in FORBIDDEN or (event == "import" and str(args[0]).startswith("planted")):
        print(json.dumps({"end": f"RAN {event} {args!r:.200}"}), flush=True)
        signal.raise_signal(signal.SIGKILL)


def main(name: str, folder: str, seed: int, first: int, count: int) -> None:
    """Read `count` damaged inputs from number `first` on."""
    reader, top = READERS[name], Path(folder)
    (path,) = top.iterdir()
    whole = dict(values(reader.read(path)))
    assert whole
    sys.addaudithook(watch)
    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
    limit = used + (reader.mib << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for number in range(first, first + count):
        what, undo, plain = damage(top, [seed, sum(name.encode()), number])
        print(json.dumps({"number": number, "what": what}), flush=True)
        signal.alarm(SECONDS)
        start = time.monotonic()
        end = verdict(reader, path, whole, plain)
        signal.alarm(0)
        print(json.dumps({"end": end, "seconds": round(time.monotonic() - start, 2)}), flush=True)
        undo()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))

"""Turn images or videos into latents to train on: python -m tools.prepare_latents IMAGES OUT --vae=VAE [--size=256]

IMAGES is a folder of class folders, a folder of images without classes, WebDataset .tar files, a .zip with
dataset.json, or a tfds dataset in array_record files such as imagenet2012. VAE is an autoencoder of Stable Diffusion's
kind: a folder as diffusers writes it, or a file. Every image is cropped as ADM does; with --crop=lanczos as U-ViT does
for MS-COCO: first a square, then Lanczos. The image and its mirror image are encoded. OUT becomes a tfds dataset for
`--config.data.data_dir=OUT`: shards of float16 means and standard deviations.

With --tokenizer=FOLDER the images have captions instead of classes: those of MS-COCO, of a table captions.csv,
metadata.csv or metadata.jsonl, of .tar files with .txt or .json, or of a .txt beside each image. --captions=FILE names
a table that lies elsewhere. Records then hold the captions of the image and their token ids. Do not train on mirror
images then: captions name left and right. An image without a caption is skipped like one that cannot be read.

With --frames=16 --interval=3 the collection holds videos: a folder of class folders, or WebDataset .tar files, of video
files or of folders of frames. Every third frame is used, 16 make a clip, and each clip becomes a record: the moments of
its frames [f h w 2c], each encoded as an image is. All clips of a video are taken that do not overlap; with
--windows=first only the first one. A video without one whole clip is skipped. The mirror images of all frames belong
together. --image and --encoder work as for images; a clip has no class token. See diversedit_jax/data/videos.py; video
files need the extra `video`.

After a kill, run the same command again: it goes on, and the records are those of an undisturbed run. Several processes
may share the work, on one machine or on several that see OUT: --process_index=0 .. n-1 --process_count=n. Images that
cannot be read are skipped and listed in OUT/report.json; with --strict they are an error. OUT/mosaic.png shows images
beside their reconstructions.

    python -m tools.prepare_latents --verify OUT [--vae=VAE]

checks a finished set: checksums, counts, ranges. With the autoencoder it also decodes a few records: OUT/verified.png.

Records are equal to the bit on the same kind of machine with the same number of devices, on GPUs with
XLA_FLAGS=--xla_gpu_deterministic_ops=true. --batch_size may not change between two runs of the same set.
"""

import contextlib
import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from diversedit_jax import __version__, encoders, sharding
from diversedit_jax.codecs import pixels
from diversedit_jax.codecs.vae import moments
from diversedit_jax.data import Dataset, clip_tokenizer, image_collections, latents, local_path, videos
from diversedit_jax.data.captions import Captioned, open_captioned
from diversedit_jax.data.clip_tokenizer import Tokenizer, open_tokenizer
from diversedit_jax.data.image_collections import ImageFiles
from diversedit_jax.data.videos import Sampling
from diversedit_jax.errors import ConfigError, DataError, MachineError
from diversedit_jax.models import PRECISIONS
from diversedit_jax.models import vae as vae_model
from diversedit_jax.registry import in_range
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import write_json
from diversedit_jax.runtime.pictures import save_png
from diversedit_jax.runtime.progress import Ticker, duration, say
from diversedit_jax.weights import hub
from diversedit_jax.weights import vae as vae_files
from diversedit_jax.weights.formats import weights_folder
from tools import latent_shards
from tools.latent_shards import Plan


class Options(NamedTuple):
    """The flags; their help is below."""

    vae: str
    size: int = 256
    kind: str | None = None
    split: str | None = None
    unconditional: bool = False
    image: str | None = None
    encoder: tuple[str, ...] = ()
    batch_size: int = 32
    per_shard: int = 4096
    threads: int = 0
    process_index: int = 0
    process_count: int = 1
    strict: bool = False
    tokenizer: str | None = None
    captions: str | None = None
    crop: str = "adm"
    precision: str = "highest"
    frames: int = 0
    interval: int = 1
    windows: str = "all"

    @property
    def sampling(self) -> Sampling | None:
        """How clips are taken from videos; None: the collection holds images."""
        return Sampling(self.frames, self.interval, self.windows) if self.frames else None

    @property
    def workers(self) -> int:
        """Threads that decode and crop."""
        return self.threads or 2 * (os.cpu_count() or 1)


JPEG_QUALITY = 95
SHOWN = 8  # images in the mosaic, and lines of skipped ones
FRAMES_SHOWN = 4  # of a clip in the mosaic


def prepare(source: str | Path, out: str | Path, options: Options) -> None:
    """Prepare a set, or the rest of one that was begun."""
    started = time.monotonic()
    check(options)
    images, captions = opened(source, options)
    folder = local_path("OUT", out).absolute()
    release = vae_files.open_vae(local_path("--vae", options.vae))
    check_size(options, release.arch.factor)
    chosen = cli.named_files("encoder", options.encoder, required=True)
    encode, shapes = encoder(release, chosen, options)
    plan = planned(images, captions, release, chosen, shapes, options)
    say(str(images))
    if captions is not None:
        say(f"  {sum(map(len, captions.found.texts))} captions; {len(captions.found.missing)} images have none")
    for what, count in images.ignored.items():
        say(f"  ignored: {count} x {what}")
    if latent_shards.claim(folder, plan):
        print(f"nothing to do: {folder} is whole")
        return

    mine = range(options.process_index, plan.shards, options.process_count)
    todo = [shard for shard in latent_shards.missing(folder, plan) if shard in mine]
    total, left = (sum(len(plan.images(shard)) for shard in shards) for shards in (mine, todo))
    with (
        ThreadPoolExecutor(options.workers) as pool,
        Ticker(total, "clips" if options.frames else "images", total - left) as ticker,
    ):
        for shard in todo:
            skipped: dict[str, str] = {}
            counts: Counter[str] = Counter()
            readable = described(images, captions, plan.images(shard), skipped)
            ticker.update(len(skipped))
            crops = cropped(images, readable, pool, skipped, counts, ticker, options)
            records = encoded(images, captions, crops, encode, counts, options)
            latent_shards.write_shard(folder, plan, shard, records, skipped, counts)

    others = latent_shards.missing(folder, plan)
    if others:
        print(f"this process is done; {len(others)} of {plan.shards} shards are left to the others")
        return
    report = summary(folder, plan, images, captions)
    write_json(folder / "report.json", report)
    about = latent_shards.finish(folder, plan)
    show(report, plan, time.monotonic() - started, folder)
    mosaic(folder, images, release, options)
    scale = about["vae"]["scale"]
    more = f" --config.codec.scale={scale}" if scale not in (None, 0.18215) else ""
    print(f"train on it: --config.data.data_dir={folder}{more}")


class Captions(NamedTuple):
    """The captions of a collection, and what turns them into token ids."""

    found: Captioned
    tokenizer: Tokenizer

    @property
    def about(self) -> dict[str, Any]:
        """What latents.json says of them."""
        made = self.tokenizer
        sizes = {"vocabulary": made.size, "length": made.length, "start": made.start, "end": made.end}
        return {"sha256": made.sha256, **sizes}

    @property
    def digest(self) -> str:
        """sha256 of all texts, in hex."""
        return hashlib.sha256(json.dumps(self.found.texts).encode()).hexdigest()

    def record(self, index: int, counts: Counter[str]) -> dict[str, Any]:
        """The part of a record that holds the captions of an image. counts: gets how many, and how many were cut."""
        texts = self.found.texts[index]
        tokens = self.tokenizer(texts)
        counts.update({"captions_written": len(texts), "captions_cut": int(tokens.cut.sum())})
        return {"tokens": tokens.ids, "text": list(texts)}


def opened(source: str | Path, options: Options) -> tuple[ImageFiles, Captions | None]:
    """The images or videos, and the captions of images if there is a tokenizer for them."""
    if options.sampling:
        return videos.open_videos(source, options.kind, options.split, options.unconditional), None
    if options.tokenizer is None:
        if options.captions is not None:
            raise ConfigError("--captions needs --tokenizer: a folder with vocab.json and merges.txt")
        return image_collections.open_images(source, options.kind, options.split, options.unconditional), None
    tokenizer = open_tokenizer(local_path("--tokenizer", hub.folder(options.tokenizer, clip_tokenizer.FILES)))
    found = open_captioned(source, options.kind, options.split, options.captions)
    if options.strict and found.missing:
        key, why = next(iter(found.missing.items()))
        raise DataError(f"{key}: {why}; {len(found.missing)} of {len(found.images)} images have no caption")
    return found.images, Captions(found, tokenizer)


def check(options: Options) -> None:
    """Raise ConfigError for options that cannot work."""
    in_range("--batch_size", options.batch_size, 1)
    in_range("--per_shard", options.per_shard, 1)
    in_range("--process_index", options.process_index, 0, options.process_count - 1)
    for name in ("tokenizer", "captions") if options.frames else ():
        if getattr(options, name):
            raise ConfigError(f"--{name} is for images, and --frames for videos: give one of them")
    if options.sampling:
        options.sampling.check()
    elif (options.interval, options.windows) != (1, "all"):
        raise ConfigError("--interval and --windows are for videos: give --frames, the number of frames of a clip")


def check_size(options: Options, factor: int) -> None:
    """Raise ConfigError for crops without whole latents. factor: image pixels per latent pixel, along a side."""
    if options.size < 1 or options.size % factor:
        raise ConfigError(f"--size = {options.size}: must be a positive multiple of {factor}, the pixels of a latent")


def planned(
    images: ImageFiles,
    captions: Captions | None,
    release: vae_files.Release,
    chosen: dict[str, dict[str, Any]],
    shapes: dict[str, tuple[int, ...]],
    options: Options,
) -> Plan:
    """The plan of the set. chosen: options of the encoders by name. shapes: of their features."""
    factor, size = release.arch.factor, options.size
    shape = (size // factor, size // factor, release.arch.latent_channels)
    shape = (options.frames, *shape) if options.sampling else shape
    about = {
        "format": latents.FORMAT,
        "moments": latents.MOMENTS,
        "shape": list(shape),
        "classes": list(images.classes) or None,
        "vae": {"name": release.name, "sha256": release.digest, "scale": release.scale, "shift": release.shift},
        "input_range": [-1, 1],
        "crop": options.crop,
        "resolution": size,
        "precision": options.precision,
        "batch_size": options.batch_size,  # the last bits of the moments depend on it
        "image": options.image,
        "encoders": {
            name: given | {"file": weights_folder.digest(hub.local(given["file"]))} for name, given in chosen.items()
        },
        "collection": {"kind": images.kind, "sha256": latent_shards.collection_digest(images.keys, images.labels)},
        "tool": f"diversedit_jax {__version__}",
    }
    if options.sampling:
        about |= {"video": True, "interval": options.interval, "windows": options.windows}
    length = None
    if captions is not None:
        about["captions"], length = captions.about, captions.tokenizer.length
        about["collection"]["captions"] = captions.digest
    features = latent_shards.features(shape, size, options.image, shapes, images.classes, length)
    return Plan(about, features, len(images), options.per_shard, images.what)


Encode = Callable[[np.ndarray], dict[str, np.ndarray]]


def encoder(
    release: vae_files.Release, chosen: dict[str, dict[str, Any]], options: Options
) -> tuple[Encode, dict[str, tuple[int, ...]]]:
    """What computes moments and features, and the shapes of the features of one image or clip by name.

    It maps crops, uint8 [b size size 3], to float16 [b 2 ...] by name: of the crop, then of its mirror image. A batch
    is filled up to a fixed size: one program is compiled, and no result depends on the number of processes. Of the
    frames of a clip the class tokens are left out, see `encoders.tokens`.
    """
    layout = sharding.make()
    network = vae_model.network(release.arch, options.precision)
    made = {name: encoders.make(name, **given) for name, given in chosen.items()}
    size = sharding.filled(options.batch_size)

    @jax.jit
    def compute(frozen: Any, crops: jax.Array) -> dict[str, jax.Array]:
        found = {"moments": moments(network, frozen["vae"], crops)}
        for name, one in made.items():
            patches, token = one.apply(frozen[name], crops)
            found[f"features/{name}"] = patches
            if token is not None and options.sampling is None:
                found[f"token/{name}"] = token
        return jax.tree.map(lambda x: x.astype(jnp.float16), found)

    @cache
    def weights() -> Any:  # read only when there is something to do
        on_host = {"vae": release.read(("encoder",))} | {name: one.init() for name, one in made.items()}
        return jax.device_put(on_host, sharding.replicated(layout))

    def encode(crops: np.ndarray) -> dict[str, np.ndarray]:
        padded = np.resize(crops, (size, *crops.shape[1:]))
        frozen = weights()
        try:
            both = [
                jax.device_get(compute(frozen, jax.device_put(np.ascontiguousarray(side), sharding.over_batch(layout))))
                for side in (padded, padded[:, :, ::-1])
            ]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(f"--batch_size={options.batch_size}: the memory of the devices is too small") from error
        return {name: np.stack([side[name][: len(crops)] for side in both], axis=1) for name in both[0]}

    abstract = {"vae": jax.eval_shape(network.init, jax.random.key(0))}
    abstract |= {name: jax.eval_shape(one.init) for name, one in made.items()}
    crops = jax.ShapeDtypeStruct((1, options.size, options.size, 3), np.uint8)
    found = jax.eval_shape(compute, abstract, crops)
    shapes = {name: leaf.shape[1:] for name, leaf in found.items() if name != "moments"}
    if options.sampling:
        shapes = {name: (options.frames * n, d) for name, (n, d) in shapes.items()}
    return encode, shapes


def described(images: ImageFiles, captions: Captions | None, indices: range, skipped: dict[str, str]) -> Sequence[int]:
    """Those of the images that have what they need beside their pixels; the others go to `skipped`."""
    if captions is None:
        return indices
    missing = captions.found.missing
    skipped |= {images.keys[index]: missing[images.keys[index]] for index in indices if images.keys[index] in missing}
    return [index for index in indices if images.keys[index] not in missing]


class Crop(NamedTuple):
    """What becomes a record: an image of the collection or a clip of a video, cropped.

    index: of the image or video. key: of the record. pixels: uint8 [size size 3], or [f size size 3].
    """

    index: int
    key: str
    pixels: np.ndarray


def crops_of(images: ImageFiles, options: Options, index: int) -> list[Crop]:
    """The crop of an image, or the clips of a video. Errors as of `image_collections.crop`."""
    key = images.keys[index]
    if options.sampling is None:
        return [Crop(index, key, image_collections.crop(images, index, options.size, options.crop))]
    found = videos.clips(images, index, options.sampling, options.size, options.crop)
    return [Crop(index, f"{key}#{number}", clip) for number, clip in enumerate(found)]


def cropped(
    images: ImageFiles,
    indices: Sequence[int],
    pool: ThreadPoolExecutor,
    skipped: dict[str, str],
    counts: Counter[str],
    ticker: Ticker,
    options: Options,
) -> Iterator[Crop]:
    """The crops of the readable images or videos in order, decoded ahead by threads; the others go to `skipped`.

    counts: gets how many videos were read. DataError if the machine fails (a lost mount, too little memory), which is
    no fault of an image.
    """
    at_once = options.workers if options.sampling else 2 * options.batch_size  # clips of a video may fill gigabytes
    ahead = image_collections.computed_ahead(partial(crops_of, images, options), indices, pool, at_once)
    with contextlib.closing(ahead):
        for index, future in ahead:
            try:
                yield from future.result()
                counts.update({"videos_read": 1} if options.sampling else {})
            except DataError as error:
                if options.strict:
                    raise
                skipped[images.keys[index]] = str(error).removeprefix(f"{images.keys[index]}: ")
            except (OSError, MachineError) as error:
                why = f"{str(error) or type(error).__name__}; once it is fixed, run the same command again"
                raise DataError(f"{images.keys[index]}: {why}") from error
            ticker.update(1)


def encoded(
    images: ImageFiles,
    captions: Captions | None,
    crops: Iterator[Crop],
    encode: Encode,
    counts: Counter[str],
    options: Options,
) -> Iterator[dict[str, Any]]:
    """The records of these crops. counts: as in `Captions.record`."""
    size = sharding.filled(options.batch_size)
    while batch := list(islice(crops, max(1, size // (options.frames or 1)))):
        found = by_frame(encode, np.stack([one.pixels for one in batch]), size)
        for row, (index, key, crop) in enumerate(batch):
            example = {name: values[row] for name, values in found.items()}
            for name, values in example.items():
                if not np.isfinite(values).all():
                    raise DataError(f"{key}: its {name} are not finite in float16")
            example["key"] = key
            example |= captions.record(index, counts) if captions else {"label": int(images.labels[index])}
            yield example | ({"image": compressed(crop, options.image)} if options.image else {})


def by_frame(encode: Encode, crops: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """`encode` for images [b H W 3], or for clips [b f H W 3]. size: of its batches.

    Of clips it gives moments [b 2 f h w 2c], and features [b 2 (f n) d].
    """
    if crops.ndim == 4:
        return encode(crops)
    frames = crops.reshape(-1, *crops.shape[2:])
    parts = [encode(frames[first : first + size]) for first in range(0, len(frames), size)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = {name: np.moveaxis(x.reshape(*crops.shape[:2], *x.shape[1:]), 2, 1) for name, x in joined.items()}
    return {name: x if name == "moments" else x.reshape(len(x), 2, -1, x.shape[-1]) for name, x in found.items()}


def compressed(crop: np.ndarray, kind: str) -> bytes | list[bytes]:
    """A crop as PNG or JPEG; of a clip, each of its frames."""
    if crop.ndim == 4:
        return [compressed(frame, kind) for frame in crop]
    file = io.BytesIO()
    quality = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "jpeg" else {}
    Image.fromarray(crop).save(file, kind, **quality)
    return file.getvalue()


def summary(folder: Path, plan: Plan, images: ImageFiles, captions: Captions | None) -> dict[str, Any]:
    """The content of report.json: counts, and why images or videos were skipped."""
    notes = [latent_shards.note(folder, shard) for shard in range(plan.shards)]
    skipped = {key: why for found in notes for key, why in found["skipped"].items()}
    lost = Counter(int(label) for key, label in zip(images.keys, images.labels, strict=True) if key in skipped)
    counts = Counter(images.labels.tolist())
    texts = latent_shards.counted(notes) | ({} if captions is None else {"left_out": dict(captions.found.left_out)})
    return {
        plan.what: plan.count,
        "records": sum(found["records"] for found in notes),
        "bytes": sum(found["bytes"] for found in notes),
        "per_class": {name: counts[i] - lost[i] for i, name in enumerate(images.classes or ("all",))},
        "skipped": skipped,
        "ignored": dict(images.ignored),
        **texts,
    }


def show(report: dict[str, Any], plan: Plan, seconds: float, folder: Path) -> None:
    """Print the report."""
    of_videos = f"clips of {report['videos_read']} of " if plan.what == "videos" else "of "
    print(f"{report['records']} {of_videos}{plan.count} {plan.what} in {plan.shards} shards, {duration(seconds)}")
    print(f"  {report['bytes'] / 2**20:.1f} MiB before compression")
    if plan.about["classes"]:
        counts = sorted(report["per_class"].values())
        most = f"{counts[-1]} {plan.what}"
        print(f"  {len(counts)} classes of {counts[0]} to {most}, median {counts[len(counts) // 2]}")
    if "captions" in plan.about:
        left_out = "".join(f", {count} {why} ones left out" for why, count in report["left_out"].items())
        length = plan.about["captions"]["length"]
        print(f"  {report['captions_written']} captions, {report['captions_cut']} cut at {length} tokens{left_out}")
    for key, why in list(report["skipped"].items())[:SHOWN]:
        print(f"  skipped: {key}: {why}")
    if len(report["skipped"]) > SHOWN:
        print(f"  and {len(report['skipped']) - SHOWN} others: {folder / 'report.json'}")


def mosaic(folder: Path, images: ImageFiles, release: vae_files.Release, options: Options) -> None:
    """Write mosaic.png: a few images or frames above the reconstructions from the means of their latents."""
    dataset = latents.make("train", data_dir=str(folder))
    place = {key: index for index, key in enumerate(images.keys)}
    originals = []
    for row, frames in some(dataset).items():
        key = latents.parsed(dataset.source.records[row])["key"].bytes_list.value[0].decode()
        found = crops_of(images, options, place[key.rpartition("#")[0] if options.sampling else key])
        whole = next(crop.pixels for crop in found if crop.key == key)
        originals += [whole[frame] for frame in frames]
    compare(np.stack(originals), reconstructed(dataset, release, options.precision), folder / "mosaic.png")


def some(dataset: Dataset) -> dict[int, list]:
    """The numbers of a few records, evenly spread over the set -> what is shown of each: frames, or all of an image."""
    records, frames = SHOWN, [...]
    if dataset.space.video:
        records, frames = SHOWN // FRAMES_SHOWN, spread(dataset.space.shape[0], FRAMES_SHOWN)
    return dict.fromkeys(spread(len(dataset.source), records), frames)


def spread(count: int, most: int) -> list[int]:
    """A few of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist()


def reconstructed(dataset: Dataset, release: vae_files.Release, precision: str) -> np.ndarray:
    """The decoded means of a few records, uint8 [n size size 3]."""
    network, params = vae_model.network(release.arch, precision), release.read(("decoder",))
    decode = jax.jit(lambda params, z: pixels.decode({}, network.decode(params, z)))
    moments = [dataset.source[row]["moments"][frame] for row, frames in some(dataset).items() for frame in frames]
    means = [one[..., : dataset.space.shape[-1]].astype(np.float32) for one in moments]
    return np.concatenate([decode(params, jnp.asarray(mean[None])) for mean in means])


def compare(originals: np.ndarray, decoded: np.ndarray, place: Path) -> None:
    """Write images above their reconstructions, small ones enlarged, and print the PSNR."""
    rows = [np.concatenate(list(row), axis=1) for row in (originals, decoded)]
    large = max(1, 96 // originals.shape[1])
    save_png(place, np.concatenate(rows).repeat(large, axis=0).repeat(large, axis=1))
    error = np.mean((originals.astype(np.float32) - decoded) ** 2)
    psnr = 10 * np.log10(255**2 / max(error, 1e-9))
    print(f"  PSNR of the reconstructions of {len(decoded)} images: {psnr:.1f} dB; side by side: {place}")


def verify(out: str | Path, vae: str | Path | None, precision: str) -> None:
    """Check a finished set. With its autoencoder, also decode a few records, beside the crops if they are stored."""
    folder = local_path("OUT", out).absolute()
    about = latent_shards.whole(folder)
    release = None if vae is None else vae_files.open_vae(local_path("--vae", vae))
    if release is not None and release.digest != about["vae"]["sha256"]:
        raise ConfigError(f"--vae={vae} is not the autoencoder that made {folder}: the checksum differs")
    begin, count = time.monotonic(), 0
    with Ticker(about["records"], "records") as ticker:
        for records in latent_shards.verify(folder):
            count += records
            ticker.update(records)
    dataset = latents.make("train", data_dir=str(folder), image=about["image"] is not None)  # as training reads it
    seconds = duration(time.monotonic() - begin)
    print(f"{folder} is whole: {count} records in {len(about['shards'])} shards, {seconds}")
    if release is None:
        print("  give --vae=VAE as well to decode a few of them")
        return
    decoded = reconstructed(dataset, release, precision)
    crops = decoded
    if about["image"] is None:
        print("  the crops are not stored: the upper row of the picture is the lower one")
    else:
        crops = np.stack([dataset.source[row]["image"][at] for row, frames in some(dataset).items() for at in frames])
    compare(crops, decoded, folder / "verified.png")


if __name__ == "__main__":
    flags.DEFINE_string("vae", None, "Autoencoder: a folder as diffusers writes it, or a weight file.")
    flags.DEFINE_integer("size", 256, "Side of the crops, in pixels.")
    flags.DEFINE_enum("kind", None, list(image_collections.KINDS), "What IMAGES is; by default it is recognised.")
    flags.DEFINE_string("split", None, "Split of a tfds dataset, or a subfolder of this name; by default train.")
    flags.DEFINE_bool("unconditional", False, "Do not read classes.")
    flags.DEFINE_enum("image", "none", ["none", "png", "jpeg"], "Also store the crops, for encoders (REPA, REG).")
    flags.DEFINE_multi_string(
        "encoder", [], "Also store features: NAME=FILE[,OPTION=VALUE...], such as dinov2=FILE. Large."
    )
    flags.DEFINE_integer("batch_size", 32, "Images or frames that all devices encode at a time; then their mirrors.")
    flags.DEFINE_integer("per_shard", 4096, "Images or videos of a shard: at 256 pixels 4,096 images are 128 MiB.")
    flags.DEFINE_integer("threads", 0, "Threads that decode and crop; 0: two for each core.")
    flags.DEFINE_integer("process_index", 0, "Which of the processes this is.")
    flags.DEFINE_integer("process_count", 1, "Processes that share the work.")
    flags.DEFINE_bool("strict", False, "An image that cannot be read or has no caption is an error.")
    flags.DEFINE_string("tokenizer", None, "Folder with CLIP's vocab.json and merges.txt: captions, not classes.")
    flags.DEFINE_string("captions", None, "Table of the captions, if it does not lie where the layout has it.")
    flags.DEFINE_enum("crop", "adm", list(image_collections.CROPS), "As ADM does, or a square and Lanczos (MS-COCO).")
    flags.DEFINE_enum("precision", "highest", list(PRECISIONS), "Of the autoencoder's products.")
    flags.DEFINE_integer("frames", 0, "Of a clip: the collection holds videos. 0: it holds images.")
    flags.DEFINE_integer("interval", 1, "Of videos, use every frame of this number: 3 is every third.")
    flags.DEFINE_enum("windows", "all", list(videos.WINDOWS), "Of a video: all clips without overlap, or the first.")
    flags.DEFINE_bool("verify", False, "Check the finished set in OUT, and do nothing else.")

    def main(arguments: list[str]) -> None:
        """Read the arguments and run."""
        cli.silence()
        given = flags.FLAGS
        if len(arguments) != (1 if given.verify else 2):
            usage = "--verify OUT" if given.verify else "IMAGES OUT --vae=VAE"
            raise ConfigError(f"usage: python -m tools.prepare_latents {usage}; --help says more")
        if given.verify:
            return verify(*arguments, given.vae, given.precision)
        if given.vae is None:
            raise ConfigError("--vae is required: a folder as diffusers writes it, or a weight file")
        options = Options(**{name: given[name].value for name in Options._fields})
        image = None if options.image == "none" else options.image
        prepare(*arguments, options._replace(image=image, encoder=tuple(options.encoder)))

    cli.launch(main, arguments=True)

"""Train a small classifier of 32 x 32 images, whose features give Frechet distances of small images.

    python -m tools.studies.classifier OUT.safetensors --data=fashion
    python -m tools.studies.classifier OUT.safetensors --data=cifar10 --data_dir=DIR \\
        --stem=3 --coarse=0 --widths=32,64,128,256 --epochs=14

Half of the images that it sees have lost detail (--coarse): they are means of 2 x 2 pixels. So it serves 16 x 16
images, too. The file is for `diversedit_jax/evaluation/extractors/small_resnet.py`. It says what it was trained on.
The norms are folded into the kernels, and numbers are float16. Takes about 20 minutes on 2 CPU cores for Fashion-MNIST,
about an hour for CIFAR-10.
"""

import itertools
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array

from diversedit_jax import data
from diversedit_jax.api import Params
from diversedit_jax.data.levels import Levels, shrunk
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation.extractors import small_resnet
from diversedit_jax.evaluation.extractors.small_resnet import LAYERS, convolution, linear
from diversedit_jax.registry import in_range
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.progress import duration
from diversedit_jax.weights.formats.weights_file import write_safetensors

SIDE = 32  # of the images
BATCH, SMOOTHING, RATE, DECAY, EPS = 128, 0.1, 3e-3, 0.05, 1e-5
CALIBRATION = 2048  # images whose mean and variance the norms take when they are folded


def initial(channels: int, widths: tuple[int, ...], classes: int, stem: int = 4) -> Params:
    """Return untrained weights. widths: channels of the stem and of each stage. stem: side of its kernels."""
    shapes = {"stem": (stem, stem, channels, widths[0])}
    for stage, (before, width) in enumerate(itertools.pairwise(widths)):
        kernels = ((3, 3, before, width), (3, 3, width, width), (1, 1, before, width))
        shapes |= {f"{stage}/{layer}": kernel for layer, kernel in zip(LAYERS, kernels, strict=True)}
    keys, init = jax.random.split(jax.random.key(0), len(shapes)), jax.nn.initializers.he_normal()
    params = {name: {"kernel": init(key, shape)} for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    for layer in params.values():
        layer |= {"scale": jnp.ones(layer["kernel"].shape[-1]), "bias": jnp.zeros(layer["kernel"].shape[-1])}
    return params | {"classifier": {"kernel": jnp.zeros((widths[-1], classes)), "bias": jnp.zeros(classes)}}


def forward(params: Params, images: Array) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Return logits with norms over the batch, and the mean and variance that each norm found."""
    found = {}

    def convolve(name: str, x: Array, stride: int) -> Array:
        x = convolution(x, params[name]["kernel"], stride)
        found[name] = mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        return (x - mean) * (jax.lax.rsqrt(variance + EPS) * params[name]["scale"]) + params[name]["bias"]

    pool = small_resnet.features(convolve, images, *small_resnet.layout(params))
    return linear(pool, **params["classifier"]), found


def folded(params: Params, images: Array) -> Params:
    """Return kernels and biases with the norms in them, as float16."""
    _, found = jax.jit(forward)(params, images)
    weights = {"classifier": params["classifier"]}
    for name, (mean, variance) in found.items():
        scale = params[name]["scale"] / jnp.sqrt(variance + EPS)
        weights[name] = {"kernel": params[name]["kernel"] * scale, "bias": params[name]["bias"] - mean * scale}
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), weights)


def augmented(images: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Shift each image by up to 2 pixels, mirror half of them, and take the detail from a share of them."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = rng.integers(5, size=(len(images), 2))
    cut = np.stack([image[i : i + SIDE, j : j + SIDE] for image, (i, j) in zip(padded, corners, strict=True)])
    mirrored, coarse = rng.random((2, len(images))) < [[0.5], [share]]
    cut[mirrored] = cut[mirrored, :, ::-1]
    cut[coarse] = without_detail(cut[coarse])
    return cut


def without_detail(images: np.ndarray) -> np.ndarray:
    """Make the 2 x 2 pixels of each square equal: their mean, as images of 16 x 16 have it."""
    return np.asarray(small_resnet.enlarged(jnp.asarray(shrunk("size", images, SIDE // 2))))


def train(
    train: Levels,
    test: Levels,
    widths: tuple[int, ...],
    epochs: int,
    devices: Sequence[jax.Device],
    stem: int = 4,
    coarse: float = 0.5,
) -> tuple[Params, float, float]:
    """Train with cross-entropy. Return the folded weights, and their accuracy on held-out images and without detail.

    devices: each computes a part of every batch. coarse: share of the images that lose their detail.
    """
    classes = int(train.labels.max()) + 1
    params = initial(train.images.shape[3], widths, classes, stem)
    steps = epochs * (len(train) // BATCH)
    rate = optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps)
    optimizer = optax.adamw(rate, weight_decay=DECAY, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))

    @jax.jit
    @jax.grad
    def gradient(params: Params, images: Array, labels: Array) -> Array:
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, classes), SMOOTHING)
        return optax.softmax_cross_entropy(forward(params, images)[0], wanted).mean()

    @jax.jit
    def update(params: Params, opt: Params, gradients: list[Params]) -> tuple[Params, Params]:
        mean = jax.tree.map(lambda *parts: sum(parts) / len(parts), *gradients)
        updates, opt = optimizer.update(mean, opt, params)
        return optax.apply_updates(params, updates), opt

    def step(params: Params, opt: Params, images: np.ndarray, labels: np.ndarray) -> tuple[Params, Params]:
        """Take a step. Each core computes a part of the batch, norms too: faster than all cores for each part."""
        parts = zip(devices, *(np.array_split(array, len(devices)) for array in (images, labels)), strict=True)
        found = [gradient(*jax.device_put((params, *part), device)) for device, *part in parts]
        return update(params, opt, jax.device_put(found, devices[0]))

    blurred = Levels(without_detail(test.images), test.labels)
    opt, rng, started = optimizer.init(params), np.random.default_rng(0), time.monotonic()
    for epoch in range(epochs):
        order = rng.permutation(len(train))[: len(train) // BATCH * BATCH].reshape(-1, BATCH)
        for rows in order:
            params, opt = step(params, opt, augmented(train.images[rows], rng, coarse), train.labels[rows])
        some = rng.permutation(len(train))[:CALIBRATION]
        weights = folded(params, augmented(train.images[some], rng, coarse))
        shares = accuracy(weights, test), accuracy(weights, blurred)
        passed = duration(time.monotonic() - started)
        print(f"epoch {epoch + 1} of {epochs}: {said(*shares)}, {passed}", flush=True)
    return weights, *shares


def said(share: float, coarse: float) -> str:
    """Return a line about two accuracies."""
    return f"{share:.2%} of the held-out images, {coarse:.2%} of them at 16 x 16"


def accuracy(weights: Params, test: Levels) -> float:
    """Return the share of images whose class the folded network recognises."""
    weights, apply = jax.tree.map(np.float32, weights), jax.jit(small_resnet.apply)
    found = [np.argmax(apply(weights, test.images[i : i + 1000]).logits, axis=1) for i in range(0, len(test), 1000)]
    return float(np.mean(np.concatenate(found) == test.labels))


def save(file: Path, weights: Params, about: Mapping[str, str]) -> None:
    """Write folded weights. about: whatever a reader wants to know."""
    arrays = {f"{layer}/{part}": array for layer, parts in weights.items() for part, array in parts.items()}
    write_safetensors(file, arrays, {**about, "side": str(SIDE)})


if __name__ == "__main__":
    flags.DEFINE_string("data", "fashion", "Name of the data set: fashion, cifar10 or images.")
    flags.DEFINE_string("data_dir", None, "Where it is; by default where Debian has Fashion-MNIST.")
    flags.DEFINE_string("test_dir", None, "Where the held-out images are, if they lie elsewhere (images).")
    flags.DEFINE_integer("epochs", 12, "Passes over the training images.")
    flags.DEFINE_float("coarse", 0.5, "Share of images that become means of 2 x 2 pixels: for images of 16 x 16.")
    flags.DEFINE_enum("stem", "4", ["3", "4"], "Side of its kernels: 4 halves the map, 3 keeps it.")
    flags.DEFINE_list("widths", ["32", "96", "160"], "Channels of the stem and of each stage.")

    def main(arguments: list[str]) -> None:
        """Read the arguments, train and write."""
        given = flags.FLAGS
        if len(arguments) != 1:
            raise ConfigError("usage: python -m tools.studies.classifier OUT.safetensors; --help says more")
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
        in_range("--epochs", given.epochs, 1)
        in_range("--coarse", given.coarse, 0, 1)
        options = {"size": SIDE} | ({"in_memory": True} if given.data == "images" else {})

        def levels(split: str, folder: str | None) -> Levels:
            place = {} if folder is None else {"data_dir": folder}
            return data.make(given.data, split, **options, **place).source

        held_out = levels("test", given.data_dir) if given.test_dir is None else levels("train", given.test_dir)
        widths = tuple(map(int, given.widths))
        images = levels("train", given.data_dir)
        form = {"stem": int(given.stem), "coarse": given.coarse}
        weights, *shares = train(images, held_out, widths, given.epochs, jax.devices(), **form)
        command = re.sub(r"[^ =]*/", "", " ".join(sys.argv[1:]))  # folders say nothing elsewhere
        about = {"accuracy": said(*shares), "command": command, "data": given.data}
        save(Path(arguments[0]).expanduser(), weights, about)
        print(f"{arguments[0]}: recognises {said(*shares)}")

    cli.launch(main, arguments=True)

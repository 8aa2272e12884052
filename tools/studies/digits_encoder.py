"""Train a small vision transformer to classify the digits, and write it in the format of DINOv2's authors.

    python -m tools.studies.digits_encoder runs/encoder.safetensors

It replaces DINOv2 if nothing can be downloaded: REPA and REG can align to its features of the digits.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from diversedit_jax.config import slot
from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import vit
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import writable_folder
from diversedit_jax.weights.vit import export

WIDTH = 48
# 16 patches of an image of 8 x 8 pixels, as many as the network has tokens
ARCH = vit.Architecture(depth=3, width=WIDTH, heads=4, hidden=4 * WIDTH, patch=2, channels=1, side=4, layer_scale=True)


def slot_of(file: str | Path) -> ConfigDict:
    """Return the encoder in `file` as an entry of config.encoders."""
    options = {"side": digits.SHAPE[0], "mean": (0.5,), "std": (0.5,), "heads": ARCH.heads, "dtype": "float32"}
    return slot("encoders", "dinov2", file=str(file), **options)


def train(file: str | Path, steps: int = 500) -> float:
    """Train with cross-entropy, write the encoder and return its accuracy on the held-out digits."""
    (images, labels), (test, test_labels) = (digits.levels(split) for split in ("train", "test"))
    images, test = (np.float32(levels / (digits.MAX_LEVEL / 2) - 1) for levels in (images, test))
    model = vit.network(ARCH)
    key_model, key_head = jax.random.split(jax.random.key(0))
    head = 0.02 * jax.random.normal(key_head, (WIDTH, digits.NUM_CLASSES))
    params = {"encoder": jax.jit(model.init)(key_model), "head": head}
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    def logits(params, x):  # reads the class token and the mean patch token, so both learn features
        tokens = vit.split(ARCH, model.apply(params["encoder"], x))
        return (tokens.class_token + tokens.patches.mean(axis=1)) @ params["head"]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    @jax.jit
    def step(params, opt, x, y):
        updates, opt = optimizer.update(jax.grad(loss)(params, x, y), opt, params)
        return optax.apply_updates(params, updates), opt

    opt, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(len(images), size=128)
        noise = 0.5 * rng.standard_normal((len(rows), *digits.SHAPE), dtype=np.float32)  # against overfitting
        params, opt = step(params, opt, images[rows] + noise, labels[rows])
    arrays = export(jax.device_get(params["encoder"]), "original", ARCH)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
    return float(np.mean(np.argmax(jax.jit(logits)(params, test), axis=1) == test_labels))


if __name__ == "__main__":

    def main(arguments: list[str]) -> None:
        """Train, and say how good it is."""
        if len(arguments) != 1:
            raise ConfigError("give the file to write, such as runs/encoder.safetensors")
        writable_folder(Path(arguments[0]).parent, "FILE")
        print(f"{arguments[0]}: recognises {train(arguments[0]):.1%} of the held-out digits")

    cli.launch(main, arguments=True)

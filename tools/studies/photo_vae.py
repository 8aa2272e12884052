"""Train a small autoencoder on a folder of images, and write it in the format of diffusers.

    python -m tools.studies.photo_vae IMAGES OUT [--steps=1500]

It replaces the VAE of Stable Diffusion if nothing can be downloaded. Takes some minutes on a CPU.
"""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from diversedit_jax import data
from diversedit_jax.api import Params
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import vae
from diversedit_jax.runtime import cli
from diversedit_jax.weights import vae as published

ARCH = vae.Architecture(widths=(16, 32, 64), layers=1, groups=8)
KL = 1e-3  # weight of the divergence from a normal distribution
SCALE = 0.18215  # standard factor of Stable Diffusion's latents


def train(images: str | Path, out: str | Path, size: int = 32, steps: int = 1500) -> float:
    """Train, write the folder and return the mean absolute error of reconstructions. Pixels are in [-1, 1]."""
    network = vae.network(ARCH)
    dataset = data.make("images", "train", data_dir=str(images), size=size, mirror=True)
    params = jax.jit(network.init)(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss(params, x, key):
        mean, std = jnp.split(network.encode(params, x), 2, axis=-1)
        decoded = network.decode(params, mean + std * jax.random.normal(key, mean.shape))
        divergence = 0.5 * jnp.mean(mean**2 + std**2 - 1 - 2 * jnp.log(std))
        error = jnp.mean(jnp.abs(decoded - x))
        return error + KL * divergence, (error, mean)

    @jax.jit
    def step(params, opt, x, key):
        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params, x, key)
        updates, opt = optimizer.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, found

    opt, errors, deviations = optimizer.init(params), [], []
    with contextlib.closing(pipeline.batches(dataset, 16, seed=0)) as loader:
        for number in tqdm(range(steps), unit="step", mininterval=5):
            key = jax.random.fold_in(jax.random.key(1), number)
            params, opt, (error, mean) = step(params, opt, next(loader)["x"], key)
            errors.append(error)
            deviations.append(jnp.std(mean))
    published.export(stretched(jax.device_get(params), 1 / (SCALE * float(np.mean(deviations[-100:])))), ARCH, out)
    return float(np.mean(errors[-100:]))


def stretched(params: Params, factor: float) -> Params:
    """Make the latents of an autoencoder `factor` times as large, so that they have unit variance after SCALE."""
    into, out = params["encoder"]["quant"], params["decoder"]["quant"]
    is_mean = np.arange(2 * ARCH.latent_channels) < ARCH.latent_channels  # the other outputs are log variances
    stretch = np.where(is_mean, factor, 1).astype(np.float32)
    shift = np.where(is_mean, 0, 2 * np.log(factor)).astype(np.float32)
    into |= {"kernel": into["kernel"] * stretch, "bias": into["bias"] * stretch + shift}
    out |= {"kernel": out["kernel"] / np.float32(factor)}
    return params


if __name__ == "__main__":
    flags.DEFINE_integer("size", 32, "Side of the images, in pixels.")
    flags.DEFINE_integer("steps", 1500, "Training steps, of 16 images.")

    def main(arguments: list[str]) -> None:
        """Read the arguments and train."""
        if len(arguments) != 2:
            raise ConfigError("usage: python -m tools.studies.photo_vae IMAGES OUT; --help says more")
        error = train(*arguments, size=flags.FLAGS.size, steps=flags.FLAGS.steps)
        print(f"{arguments[1]}: mean absolute error {127.5 * error:.1f} of 255 grey levels")

    cli.launch(main, arguments=True)

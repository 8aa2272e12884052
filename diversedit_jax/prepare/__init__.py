"""From stored data to the network's space and back, on device, one way per file."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diversedit_jax import registry
from diversedit_jax.api import Batch, Params, Prepare
from diversedit_jax.encoders import Encoder
from diversedit_jax.errors import ConfigError


def make(name: str, **options):
    """The preparation `name` as a `Prepare`; the options are the keywords of `prepare.<name>.make`."""
    return registry.make("prepare", name, **options)


def with_encoders(prepare: Prepare, encoders: Mapping[str, Encoder]) -> Prepare:
    """The preparation, which then also runs frozen encoders on the raw `image` [b h w c], values 0 .. 255.

    The batch gets `features/<label>` float32 [b n d], the patch tokens, and from an encoder that has a class token
    `token/<label>` float32 [b d]. No gradient passes. Raises ConfigError for a batch without `image`, or one that has
    these features already.
    """

    def init() -> Params:
        return {"prepare": prepare.init(), "encoders": {label: encoder.init() for label, encoder in encoders.items()}}

    def apply(frozen: Params, batch: Batch, key: Array) -> Batch:
        batch = dict(prepare.apply(frozen["prepare"], batch, key))
        if "image" not in batch:
            raise ConfigError(
                f"config.encoders.{next(iter(encoders))} reads `image`, and a batch has {', '.join(sorted(batch))}: "
                "set config.data.image=True, for data that hold it"
            )
        for label, encoder in encoders.items():
            if f"features/{label}" in batch:
                raise ConfigError(f"features/{label} are in the data already: remove config.encoders.{label}")
            patches, token = encoder.apply(frozen["encoders"][label], batch["image"])
            found = {"features": patches} | ({} if token is None else {"token": token})
            batch |= {f"{kind}/{label}": jax.lax.stop_gradient(x.astype(jnp.float32)) for kind, x in found.items()}
        return batch

    def decode(frozen: Params, x: Array) -> Array:
        return prepare.decode(frozen["prepare"], x)

    return Prepare(init, apply, None if prepare.decode is None else decode)

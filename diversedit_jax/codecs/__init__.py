"""From stored data to the network's space and back, on device, one way per file."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diversedit_jax import registry
from diversedit_jax.api import Batch, Codec, Params
from diversedit_jax.encoders import Encoder
from diversedit_jax.errors import ConfigError


def make(name: str, **options):
    """The codec `name`; the options are the keywords of `codecs.<name>.make`."""
    return registry.make("codecs", name, **options)


def with_encoders(codec: Codec, encoders: Mapping[str, Encoder]) -> Codec:
    """The preparation, which then also runs frozen encoders on the raw `image` [b h w c], values 0 .. 255.

    The batch gets `features/<label>` float32 [b n d], the patch tokens, and from an encoder that has a class token
    `token/<label>` float32 [b d]. No gradient passes. Raises ConfigError for a batch without `image`, or one that has
    these features already.
    """

    def init() -> Params:
        return {"codec": codec.init(), "encoders": {label: encoder.init() for label, encoder in encoders.items()}}

    def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
        batch = dict(codec.encode(frozen["codec"], batch, key))
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
        return codec.decode(frozen["codec"], x)

    return Codec(init, encode, None if codec.decode is None else decode)

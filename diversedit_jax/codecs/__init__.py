"""Codecs: from stored data to the network's space and back, on device. One codec per file."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diversedit_jax import registry
from diversedit_jax.api import Batch, Codec, Condition, Conditions, Params, Space
from diversedit_jax.data.levels import VALUES, Levels
from diversedit_jax.encoders import Encoder, TextEncoder, tokens
from diversedit_jax.errors import ConfigError

# make(name, **options): the codec `name`; the options are the keywords of `codecs.<name>.make`.
make = partial(registry.make, "codecs")


def network_space(codec: Codec, stored: Space) -> Space:
    """The network's space for stored examples of a space. Its null condition is only a shape."""
    conditions = stored.conditions
    null = jax.eval_shape(lambda frozen: null_condition(codec, frozen, conditions.null), jax.eval_shape(codec.init))
    return Space(codec.shape(stored.shape), Conditions(null, conditions.classes), stored.video)


def encoded(codec: Codec, frozen: Params, batch: Batch, key: Array) -> Batch:
    """A stored batch in the network's space, with `x` and `y` for the network."""
    if missing := [name for name in codec.reads if name not in batch]:
        given = f"the data give {', '.join(sorted(batch))}"
        raise ConfigError(
            f"config.codec reads `{missing[0]}`, but {given}: choose a codec for these data, or other data"
        )
    batch = dict(codec.encode(frozen, batch, key))
    return batch | {"y": codec.condition(frozen, batch["y"])}


def null_condition(codec: Codec, frozen: Params, null):
    """The null condition for the network, from the stored one; both without a batch axis."""
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], null)
    return jax.tree.map(lambda leaf: leaf[0], codec.condition(frozen, batch))


def with_encoders(codec: Codec, encoders: Mapping[str, Encoder]) -> Codec:
    """A codec that also runs frozen encoders on the raw `image` [b h w c] or [b f h w c], values 0 .. 255.

    The batch gets the patch tokens, `features/<label>` float32 [b n d], and if there is one the class token,
    `token/<label>` float32 [b d], see `encoders.tokens`. No gradient passes.
    """

    def init() -> Params:
        return {"codec": codec.init(), "encoders": {label: encoder.init() for label, encoder in encoders.items()}}

    def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
        batch = dict(codec.encode(frozen["codec"], batch, key))
        if "image" not in batch:
            raise ConfigError(
                f"config.encoders.{next(iter(encoders))} reads `image`, but a batch has {', '.join(sorted(batch))}: "
                "set config.data.image=True if the data have images"
            )
        for label, encoder in encoders.items():
            if f"features/{label}" in batch:
                raise ConfigError(f"features/{label} are in the data already: remove config.encoders.{label}")
            patches, token = tokens(encoder, frozen["encoders"][label], batch["image"])
            found = {"features": patches} | ({} if token is None else {"token": token})
            batch |= {f"{kind}/{label}": jax.lax.stop_gradient(x.astype(jnp.float32)) for kind, x in found.items()}
        return batch

    return Codec(init, encode, _inside(codec.decode), _inside(codec.condition), codec.shape, codec.reads)


def with_text(codec: Codec, encoder: TextEncoder) -> Codec:
    """A codec that also turns the token ids of texts into features. Features that are stored stay as they are."""

    def init() -> Params:
        return {"codec": codec.init(), "text": encoder.init()}

    def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
        return codec.encode(frozen["codec"], batch, key)

    def condition(frozen: Params, condition: Condition) -> Condition:
        ids = not isinstance(condition, Mapping)
        return encoder.apply(frozen["text"], jnp.asarray(condition)) if ids else condition

    return Codec(init, encode, _inside(codec.decode), condition, codec.shape, codec.reads)


def resident(codec: Codec, levels: Levels) -> Codec:
    """A codec that has the images among its frozen weights, as 256 levels, for batches of numbers (`levels.numbered`).

    It gives the same examples as the host would. Batches that hold their images pass as before.
    """

    def init() -> Params:
        # a table of values: a division on the device could differ from the host's in the last bit
        return {"codec": codec.init(), "images": levels.images, "labels": levels.labels, "values": VALUES}

    def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
        batch = dict(batch)
        if (number := batch.pop("number", None)) is not None:
            x = frozen["values"][frozen["images"][number]]
            if (mirrored := batch.pop("mirrored", None)) is not None:
                x = jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
            batch |= {"x": x, "y": frozen["labels"][number]}
        return codec.encode(frozen["codec"], batch, key)

    return Codec(init, encode, _inside(codec.decode), _inside(codec.condition), codec.shape)


def _inside(function: Callable | None) -> Callable | None:
    """A direction of a codec whose weights are the entry `codec` of the frozen weights."""
    return None if function is None else lambda frozen, value: function(frozen["codec"], value)

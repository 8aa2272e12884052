"""The frozen vision transformer (arXiv 2010.11929) of published image encoders: one network for all of them.

DINOv2 (arXiv 2304.07193, 2309.16588), DINO (2104.14294), MAE (2111.06377), MoCo v3 (2104.02057), I-JEPA (2301.08243)
and CLIP (2103.00020) differ only in their `Architecture`. The order of tokens: class token, registers, patches.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, Model, bicubic, functional
from diversedit_jax.models.attention import attend, choose
from diversedit_jax.models.patches import patchify
from diversedit_jax.models.stack import stacked
from diversedit_jax.registry import one_of

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Architecture(NamedTuple):
    """Everything that distinguishes one encoder from another.

    hidden:      width inside of the MLP; with `swiglu`, of each of its two halves.
    side:        patches along a side of the stored position table.
    class_token: has its own place in the position table. Registers have none.
    pre_norm:    a norm before the first block (CLIP). The patches then have no bias.
    final_norm:  take the features after the last norm; else from the last block.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    patch: int
    channels: int
    side: int
    class_token: bool = True
    registers: int = 0
    layer_scale: bool = False
    swiglu: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    activation: str = "gelu"
    eps: float = 1e-6


class Tokens(NamedTuple):
    """The output of an encoder, by kind of token."""

    class_token: Float[Array, "b d"] | None
    registers: Float[Array, "b r d"]
    patches: Float[Array, "b n d"]


def split(arch: Architecture, tokens: Float[Array, "b m d"]) -> Tokens:
    """The network's output, by kind of token."""
    first = int(arch.class_token)
    patches = first + arch.registers
    return Tokens(tokens[:, 0] if arch.class_token else None, tokens[:, first:patches], tokens[:, patches:])


# How the position table is resampled for another number of patches: (antialias, offset). With an offset o, the scale is
# side / (wanted + o) and not side / wanted. Models with registers are always resampled as in "repa".
POSITIONS = {
    "repa": (True, 0.0),  # timm's resampling, which REPA runs on every encoder when it loads one
    "hub": (False, 0.1),  # the code of DINOv2's authors
    "hf": (False, 0.0),  # Hugging Face transformers
}


def resample(
    table: Float[Array | np.ndarray, "n d"], side: int, wanted: tuple[int, int], antialias: bool, offset: float
) -> Float[Array | np.ndarray, "m d"]:
    """Resample the position table of side x side patches to `wanted` (rows, columns); see POSITIONS."""
    if wanted == (side, side):
        return table
    square = jnp.asarray(table).reshape(side, side, -1)
    rows, columns = (bicubic.weights(side, n, antialias, side / (n + offset)) for n in wanted)
    return bicubic.apply(rows, columns, square).reshape(-1, table.shape[-1])


class Block(nnx.Module):
    """A pre-norm transformer block, with DINOv2's LayerScale and SwiGLU where the architecture has them."""

    def __init__(self, arch: Architecture, dtype, *, rngs: Keys):
        norm = partial(nnx.LayerNorm, arch.width, epsilon=arch.eps, dtype=jnp.float32, rngs=rngs)
        # The weights are never trained, so they are stored in the dtype of their products.
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        qkv = (3, arch.heads, arch.width // arch.heads)
        self.norm1, self.norm2 = norm(), norm()
        self.qkv = nnx.LinearGeneral(arch.width, qkv, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.proj = linear(arch.width, arch.width)
        self.scale1, self.scale2 = (nnx.Param(jnp.ones(arch.width)) if arch.layer_scale else None for _ in range(2))
        self.fc1 = linear(arch.width, arch.hidden * (2 if arch.swiglu else 1))
        self.fc2 = linear(arch.hidden, arch.width)
        self.arch, self.dtype = arch, dtype
        self.attention = choose("auto", dtype.name)

    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        x = x + _scaled(self._attention(self.norm1(x)), self.scale1)
        return x + _scaled(self._mlp(self.norm2(x)), self.scale2)

    def _attention(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        q, k, v = jnp.moveaxis(self.qkv(x.astype(self.dtype)), 2, 0)
        return self.proj(attend(q, k, v, self.attention).reshape(x.shape))

    def _mlp(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        hidden = self.fc1(x.astype(self.dtype))
        if self.arch.swiglu:
            gate, hidden = jnp.split(hidden, 2, axis=-1)
            return self.fc2(jax.nn.silu(gate) * hidden)
        return self.fc2(ACTIVATIONS[self.arch.activation](hidden))


def _scaled(x: Float[Array, "b m d"], scale: nnx.Param | None) -> Float[Array, "b m d"]:
    x = x.astype(jnp.float32)
    return x if scale is None else x * scale[...]


class ViT(nnx.Module):
    """Normalised images [b h w c] -> tokens [b m d], float32: class token, registers, and patches row by row."""

    def __init__(self, arch: Architecture, position: tuple[bool, float], dtype, *, rngs: Keys):
        def token(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (*shape, arch.width)))

        norm = partial(nnx.LayerNorm, arch.width, epsilon=arch.eps, dtype=jnp.float32, rngs=rngs)
        inputs = arch.patch**2 * arch.channels
        bias = not arch.pre_norm
        self.patch_embed = nnx.Linear(inputs, arch.width, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.position = token(arch.class_token + arch.side**2)
        self.class_token = token() if arch.class_token else None
        self.registers = token(arch.registers) if arch.registers else None
        self.pre_norm = norm() if arch.pre_norm else None
        self.blocks = stacked(lambda rngs: Block(arch, dtype, rngs=rngs), arch.depth, rngs)
        self.norm = norm() if arch.final_norm else None
        self.arch, self.resampling, self.dtype = arch, position, dtype

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b m d"]:
        arch = self.arch
        *sides, channels = images.shape[1:]
        if channels != arch.channels:
            raise ConfigError(f"the encoder takes images of {arch.channels} channels, given {channels}")
        if any(side % arch.patch for side in sides):
            raise ConfigError(f"the encoder's patches of {arch.patch} pixels do not divide {sides[0]} x {sides[1]}")
        grid = tuple(side // arch.patch for side in sides)
        x = self.patch_embed(patchify(images, (arch.patch,) * 2).astype(self.dtype)).astype(jnp.float32)
        x = x + resample(self.position[int(arch.class_token) :], arch.side, grid, *self.resampling)
        prefix = [] if self.class_token is None else [(self.class_token[...] + self.position[0])[None]]
        prefix += [] if self.registers is None else [self.registers[...]]
        x = jnp.concatenate([*(jnp.broadcast_to(p, (len(x), *p.shape)) for p in prefix), x], axis=1)
        x = x if self.pre_norm is None else self.pre_norm(x)
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return x if self.norm is None else self.norm(x)


def network(arch: Architecture, position: str = "repa", dtype: str = "float32") -> Model:
    """The encoder as pure functions: init: key -> random params; apply: (params, images [b h w c]) -> tokens [b m d].

    position: how to resample the position table for images of another side, see POSITIONS.
    dtype: of matmuls and their weights, `float32` or `bfloat16`. Norms, softmax, residuals and output are float32.
    """
    one_of("encoder: position", position, POSITIONS)
    one_of("encoder: dtype", dtype, ("float32", "bfloat16"))
    if arch.width % arch.heads:
        raise ConfigError(f"encoder: heads = {arch.heads} does not divide the width {arch.width}")
    resampling = POSITIONS["repa" if arch.registers else position]
    return functional(lambda rngs: ViT(arch, resampling, jnp.dtype(dtype), rngs=rngs))

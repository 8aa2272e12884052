"""The encoder of MAE (arXiv 2111.06377).

Features are the patch tokens that the last block gives, without the last norm: so does REPA's code. Images of 256
pixels are normalised and not resized.
"""

from diversedit_jax.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, build
from diversedit_jax.weights.vit import HEADS, Kind, open_encoder

KIND = Kind("mae", ("original",), HEADS, entry="model", aside=("mask_token", "decoder_"), final_norm=False)


def make(
    *,
    file: str,
    side: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    heads: int | None = None,
    dtype: str = "bfloat16",
) -> Encoder:
    """MAE from a file of its authors, such as `mae_pretrain_vit_large.pth`; options as `dinov2`'s."""
    release = open_encoder(KIND, file, heads, dtype=dtype)
    return build("mae", release, side=side, mean=mean, std=std, position="repa", dtype=dtype)

"""DINO (arXiv 2104.14294), which is DINOv1 in REPA: ViT-S and ViT-B in patches of 16 or 8 pixels.

Features are the patch tokens after the last norm. Images of 256 pixels are normalised and not resized.
"""

from diversedit_jax.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, build
from diversedit_jax.weights.vit import HEADS, Kind, open_encoder

KIND = Kind("dinov1", ("original", "hf_vit"), HEADS, aside=("pooler.",))


def make(
    *,
    file: str,
    side: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    heads: int | None = None,
    dtype: str = "bfloat16",
) -> Encoder:
    """DINO from a backbone of its authors (`dino_vitbase16_pretrain.pth`) or of Hugging Face; options as `dinov2`'s."""
    release = open_encoder(KIND, file, heads, dtype=dtype)
    return build("dinov1", release, side=side, mean=mean, std=std, position="repa", dtype=dtype)

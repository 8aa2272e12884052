"""The encoder of I-JEPA (arXiv 2301.08243), which has no class token.

Features are the patch tokens after the last norm. Images of 256 pixels are normalised and then resized to 224.
"""

from diversedit_jax.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, build
from diversedit_jax.weights.vit import HEADS, Kind

KIND = Kind("ijepa", ("original",), HEADS, entry="encoder", class_token=False)


def make(
    *,
    file: str,
    weights: str = "encoder",
    side: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    heads: int | None = None,
    dtype: str = "bfloat16",
) -> Encoder:
    """I-JEPA from a file of its authors, such as `IN1K-vit.h.14-300e.pth.tar`.

    weights: the entry of the file: `encoder` (REPA) or `target_encoder`, its EMA, which I-JEPA evaluates.

    The other options are those of `encoders.dinov2.make`.
    """
    return build(KIND._replace(entry=weights), file, side, mean, std, heads, dtype)

"""DINOv2 (arXiv 2304.07193), also with registers (2309.16588): the encoder of REPA's main results.

Features are the patch tokens after the last norm. Images of 256 and 512 pixels are normalised and then resized to 224
and 448, so that 16 x 16 and 32 x 32 patches remain: a token for each of SiT's.
"""

from diversedit_jax.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, build
from diversedit_jax.weights.vit import HEADS, Kind

KIND = Kind(
    "dinov2",
    ("original", "hf_dinov2"),
    HEADS,
    aside=("mask_token", "embeddings.mask_token"),
    layer_scale=True,
)


def make(
    *,
    file: str,
    side: int | None = None,
    position: str = "repa",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    heads: int | None = None,
    dtype: str = "bfloat16",
) -> Encoder:
    """DINOv2 S, B, L or g from a file of its authors or of Hugging Face.

    file: .pth or .safetensors; size, patch, registers and channels are read from its arrays.
    side: of the network's input, in pixels; None: REPA's, for images of 256 or 512 pixels.
    position: how the position table is resampled: `repa`, `hub` or `hf`, see `models.vit.POSITIONS`.
    mean, std: of the images, of each channel, divided by 255. heads: of a width that was not published.
    dtype: of matmuls and their weights, `bfloat16` or `float32`; all else is float32.
    """
    return build(KIND, file, side, mean, std, heads, dtype, position, sizes=(256, 512))

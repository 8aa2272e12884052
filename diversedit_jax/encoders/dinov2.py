"""DINOv2 (arXiv 2304.07193), also with registers (2309.16588): the encoder of REPA's main results.

Features are the patch tokens after the last norm. Images of 256 and 512 pixels are normalised and then resized to 224
and 448. This gives 16 x 16 and 32 x 32 patches, one for each token of SiT.
"""

from diversedit_jax.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, build
from diversedit_jax.weights.vit import HEADS, Kind

IGNORED = ("mask_token", "embeddings.mask_token")
KIND = Kind("dinov2", ("original", "hf_dinov2"), HEADS, ignored=IGNORED, layer_scale=True)


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

    file: .pth or .safetensors. Its arrays give size, patch, registers and channels.
    side: of the network's input, in pixels. None: REPA's, for images of 256 or 512 pixels.
    position: how the position table is resampled: `repa`, `hub` or `hf`, see `models.vit.POSITIONS`.
    mean, std: of each channel of the images, divided by 255. heads: for a width that was not published.
    dtype: of matmuls and their weights, `bfloat16` or `float32`. All else is float32.
    """
    return build(KIND, file, side, mean, std, heads, dtype, position, sizes=(256, 512))

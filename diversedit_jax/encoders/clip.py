"""The vision transformer of CLIP (arXiv 2103.00020).

Features are the patch tokens that the last block gives, without the last norm and projection: so does REPA's code.
Images of 256 pixels are resized to 224 and then normalised, with CLIP's own statistics.
"""

from diversedit_jax.encoders import CLIP_MEAN, CLIP_STD, Encoder, build
from diversedit_jax.weights.vit import Kind, open_encoder

TEXT = ("text_model.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
KIND = Kind(
    "clip",
    ("hf_clip", "clip"),
    {768: 12, 1024: 16},
    aside=(*TEXT, "logit_scale", "visual.proj", "visual_projection.", "vision_model.embeddings.position_ids"),
    final_norm=False,
    activation="quick_gelu",
    eps=1e-5,
)


def make(
    *,
    file: str,
    side: int | None = None,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    heads: int | None = None,
    dtype: str = "bfloat16",
) -> Encoder:
    """CLIP from a file of Hugging Face, or a state dict under OpenAI's names; options as `dinov2`'s.

    OpenAI's own files are programs (TorchScript) and are refused.
    """
    release = open_encoder(KIND, file, heads, dtype=dtype)
    return build("clip", release, side=side, mean=mean, std=std, position="repa", dtype=dtype, resize_first=True)

"""The vision transformer of CLIP (arXiv 2103.00020).

Features are the patch tokens after the last block, without the last norm and projection, as in REPA's code. Images of
256 pixels are resized to 224 and then normalised with CLIP's own statistics.
"""

from diversedit_jax.encoders import CLIP_MEAN, CLIP_STD, factory
from diversedit_jax.weights.vit import Kind

TEXT = ("text_model.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
KIND = Kind(
    "clip",
    ("hf_clip", "clip"),
    {768: 12, 1024: 16},
    ignored=(*TEXT, "logit_scale", "visual.proj", "visual_projection.", "vision_model.embeddings.position_ids"),
    final_norm=False,
    activation="quick_gelu",
    eps=1e-5,
)

# From a file of Hugging Face, or a state dict with OpenAI's names. OpenAI's own files are TorchScript: refused.
make = factory(KIND, CLIP_MEAN, CLIP_STD, resize_first=True)

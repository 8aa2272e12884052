"""The small text encoder of the captioned digits, which comes with the package: see `data.captioned_digits`."""

from diversedit_jax.data.captioned_digits import TEXT_ENCODER
from diversedit_jax.encoders import TextEncoder, clip_text


def make(*, pooled: bool = False, dtype: str = "float32") -> TextEncoder:
    """CLIP's text encoder in small: 16 tokens of 64 features. pooled, dtype: as in `clip_text.make`."""
    return clip_text.make(file=str(TEXT_ENCODER), pooled=pooled, dtype=dtype)

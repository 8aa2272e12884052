"""The vision transformers of MoCo v3 (arXiv 2104.02057).

Features are the patch tokens after the last norm. Images of 256 pixels are normalised and not resized.
"""

from diversedit_jax.encoders import factory
from diversedit_jax.weights.vit import HEADS, Kind

# The ViT-L that REPA reads has four misspelt modules.
MISSPELT = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def rename(name: str) -> str:
    """A name in `state_dict` without the encoder's prefix, with the spelling corrected."""
    name = name.removeprefix("base_encoder.")
    for wrong, right in MISSPELT.items():
        name = name.replace(wrong, right)
    return name


KIND = Kind(
    "moco_v3",
    ("original",),
    HEADS | {384: 12},  # its ViT-S has heads of half the usual width
    entry="state_dict",
    ignored=("head.", "momentum_encoder.", "predictor."),
    rename=rename,
)

# From a training file: its `module.base_encoder`, without the head.
make = factory(KIND)

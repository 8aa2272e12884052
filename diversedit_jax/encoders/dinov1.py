"""DINO (arXiv 2104.14294), called DINOv1 in REPA: ViT-S and ViT-B with patches of 16 or 8 pixels.

Features are the patch tokens after the last norm. Images of 256 pixels are normalised and not resized.
"""

from diversedit_jax.encoders import factory
from diversedit_jax.weights.vit import HEADS, Kind

KIND = Kind("dinov1", ("original", "hf_vit"), HEADS, ignored=("pooler.",))

# From a backbone of its authors (`dino_vitbase16_pretrain.pth`) or of Hugging Face.
make = factory(KIND)

"""The encoder of MAE (arXiv 2111.06377).

Features are the patch tokens after the last block, without the last norm, as in REPA's code. Images of 256 pixels are
normalised and not resized.
"""

from diversedit_jax.encoders import factory
from diversedit_jax.weights.vit import HEADS, Kind

KIND = Kind("mae", ("original",), HEADS, entry="model", ignored=("mask_token", "decoder_"), final_norm=False)

# From a file of its authors, such as `mae_pretrain_vit_large.pth`.
make = factory(KIND)

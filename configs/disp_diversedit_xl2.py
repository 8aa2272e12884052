"""DiverseDiT with Dispersive Loss on SiT-XL/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/disp_diversedit_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; the paper used 8 H800.
Expected: no score of this pair is published; of size B, see configs/disp_diversedit_b2.py.
"""

from ml_collections import ConfigDict

from configs import disp_diversedit_b2, diversedit_xl2


def get_config(resolution: str = "256") -> ConfigDict:
    """DiverseDiT-XL/2's recipe for `256` or `512` pixels, with Dispersive Loss on the last block."""
    return disp_diversedit_b2.disperse(diversedit_xl2.get_config(resolution), last=28)

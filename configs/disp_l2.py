"""Dispersive Loss on SiT-L/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/disp_l2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs.
Expected: no score of this size is known to us.
"""

from ml_collections import ConfigDict

from configs import disp_b2, sit_l2


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-L/2's recipe for `256` or `512` pixels, with Dispersive Loss on block 6."""
    return disp_b2.disperse(sit_l2.get_config(resolution), block=6)

"""SRA on SiT-L/2: alignment to the EMA network's later block, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/sra_l2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs.
Expected: no score of this size is known to us.
"""

from ml_collections import ConfigDict

from configs import sit_l2, sra_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-L/2's recipe for `256` or `512` pixels, with SRA from block 6 to 16."""
    return sra_b2.distil(sit_l2.get_config(resolution), block=6, teacher_block=16)

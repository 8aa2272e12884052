"""DiverseDiT with SRA on SiT-B/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/sra_diversedit_b2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs.
Expected: this pair alone has no published score; with Dispersive Loss too, configs/diversedit_disp_sra_b2.py.
"""

from ml_collections import ConfigDict

from configs import diversedit_b2, sra_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """DiverseDiT-B/2's recipe for `256` or `512` pixels, with SRA from block 3 to 8."""
    return sra_b2.distil(diversedit_b2.get_config(resolution), block=3, teacher_block=8)

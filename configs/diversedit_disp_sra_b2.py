"""DiverseDiT with Dispersive Loss and SRA on SiT-B/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/diversedit_disp_sra_b2.py --workdir=DIR \\
        --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Table 9: FID-50K, SDE 250 steps, no guidance): 21.95 at 256; 512 is not published.
"""

from ml_collections import ConfigDict

from configs import disp_diversedit_b2, sra_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """Its authors' combination for `256` or `512` pixels; the blocks and weights of SRA are those of SRA's paper."""
    return sra_b2.distil(disp_diversedit_b2.get_config(resolution), block=3, teacher_block=8)

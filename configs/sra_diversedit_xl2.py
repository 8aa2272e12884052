"""DiverseDiT with SRA on SiT-XL/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/sra_diversedit_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs.
Expected: no score of this pair is published.
"""

from ml_collections import ConfigDict

from configs import diversedit_xl2, sra_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """DiverseDiT-XL/2's recipe for `256` or `512` pixels, with SRA from block 8 to 20."""
    return sra_b2.distil(diversedit_xl2.get_config(resolution), block=8, teacher_block=20)

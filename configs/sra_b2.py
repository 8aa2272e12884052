"""SRA on SiT-B/2: alignment to the EMA network's later block, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/sra_b2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs.
Expected at 400K steps (arXiv 2505.02831: FID-50K, SDE 250 steps, no guidance): 29.10 at 256, where its authors'
SiT-B/2 has 33.02. Nobody has published a score at 512.
"""

from ml_collections import ConfigDict

from configs import sit_b2
from diversedit_jax.config import slot


def distil(config: ConfigDict, block: int, teacher_block: int) -> ConfigDict:
    """A recipe with SRA: block -> teacher_block of the EMA network, the paper's distance, weight and decay."""
    decay = (99, 800) if config.data.shape[0] == 64 else (149, 1000)  # 512 pixels, 256 pixels
    config.losses.sra = slot(
        "losses",
        "sra",
        block=block,
        teacher_block=teacher_block,
        decay_from_epoch=decay[0],
        decay_epochs=decay[1],
        dtype="bfloat16",
    )
    return config


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-B/2's recipe for `256` or `512` pixels, with SRA from block 3 to 8."""
    return distil(sit_b2.get_config(resolution), block=3, teacher_block=8)

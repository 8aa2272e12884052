"""SRA on SiT: a block aligned to a later block of the EMA network (arXiv 2505.02831).

    python -m diversedit_jax.train --config=configs/sra.py:xl2 --workdir=DIR --config.data.data_dir=LATENTS

Variant: a size (b2, l2, xl2), a resolution (256, 512) and `diversedit`; b2 and 256 by default. For DiverseDiT with SRA
and Dispersive Loss see configs/disp.py.
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs.
Expected: FID-50K, SDE with 250 steps (arXiv 2505.02831; its SiT-B/2 has 33.02). xl2 has its authors' schedule: guidance
1.8 at 256 and 2.5 at 512, for t <= 0.7. Variants that are not in the table have no published score.

    | variant |  steps |   256 |  512 |
    |---------|--------|-------|------|
    | b2      |   400K | 29.10 |      |
    | xl2     |     1M |       | 2.17 |
    | xl2     |     2M |  1.85 | 2.07 |
    | xl2     |     4M |  1.58 |      |
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, sit, variants

BLOCKS = {"b2": (3, 8), "l2": (6, 16), "xl2": (8, 20)}  # the aligned block, the teacher's


def distil(config: ConfigDict, block: int, teacher_block: int) -> ConfigDict:
    """Add SRA to a recipe, with the paper's distance, weight and decay."""
    start, length = (99, 800) if config.data.shape[0] == 64 else (149, 1000)  # 512 pixels, 256 pixels
    blocks = {"block": block, "teacher_block": teacher_block}
    decay = {"decay_from_epoch": start, "decay_epochs": length}
    config.losses.sra = slot("losses", "sra", **blocks, **decay, dtype="bfloat16")
    return config


def get_config(variant: str = "") -> ConfigDict:
    """SiT's recipe, or DiverseDiT's, with SRA."""
    size, resolution, added = variants.read(variant, "diversedit")
    config = sit.get_config(f"{size},{resolution}")
    if added:
        diversedit.diversify(config)
    elif size == "xl2":
        config.total_steps = 4_000_000 if resolution == "256" else 2_000_000
        config.sampler.update({"cfg_scale": 1.8 if resolution == "256" else 2.5, "guidance_interval": (0.0, 0.7)})
    return distil(config, *BLOCKS[size])

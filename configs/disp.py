"""Dispersive Loss on SiT (arXiv 2506.09027).

    python -m diversedit_jax.train --config=configs/disp.py:b2,diversedit,sra --workdir=DIR \\
        --config.data.data_dir=LATENTS

Variant: a size (b2, l2, xl2), a resolution (256, 512), `diversedit` and `sra`; b2 and 256 by default.
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs; the paper used 8 H800.
Expected: FID-50K after 400K steps at 256. Variants that are not in the table have no published score.

    | variant           |   FID | sampled with                    | source                       |
    |-------------------|-------|---------------------------------|------------------------------|
    | b2                | 32.35 | --solver=dopri5                 | arXiv 2506.09027 (SiT 36.49) |
    | xl2               |  5.09 | --solver=dopri5 --cfg_scale=1.5 | arXiv 2506.09027 (SiT 6.02)  |
    | b2,diversedit     | 24.98 | SDE with 250 steps, no guidance | arXiv 2603.04239, Table 9    |
    | b2,diversedit,sra | 21.95 | SDE with 250 steps, no guidance | arXiv 2603.04239, Table 9    |
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, sit, sra, variants

BLOCKS = {"b2": 3, "l2": 6, "xl2": 7}
DEPTHS = {"b2": 12, "l2": 24, "xl2": 28}


def get_config(variant: str = "") -> ConfigDict:
    """SiT's recipe, or DiverseDiT's, with Dispersive Loss.

    SiT's has the settings of the loss's paper: coefficient and tau 0.5, 16 examples at a time. DiverseDiT's has
    those of the loss's PyTorch code: the last block, 32 examples at a time. DiverseDiT's paper does not say which it
    took; its author reports the plateau of this code, -ln 32.
    """
    size, resolution, added = variants.read(variant, "diversedit", "sra")
    config = sit.get_config(f"{size},{resolution}")
    if "diversedit" in added:
        diversedit.diversify(config)
        options = {"coefficient": 0.25, "tau": 1.0, "groups": config.batch_size // 32}
        config.losses.dispersive = slot("losses", "dispersive", blocks=(DEPTHS[size],), **options)
    else:
        groups = config.batch_size // 16
        config.losses.dispersive = slot("losses", "dispersive", blocks=(BLOCKS[size],), groups=groups)
        config.optim.b2 = 0.95
    return sra.distil(config, *sra.BLOCKS[size]) if "sra" in added else config

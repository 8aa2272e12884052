"""SiT on ImageNet latents: the paper's baseline (arXiv 2603.04239, Table A1).

    python -m diversedit_jax.train --config=configs/sit.py:xl2,512 --workdir=DIR --config.data.data_dir=LATENTS

Variant: a size (b2, l2, xl2) and a resolution (256, 512); b2 and 256 by default.
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs; the paper used 8 H800.
Expected: FID-50K after 400K steps, SDE with 250 steps, no guidance (paper, Tables 1 and A3).

    | variant |   256 |   512 |
    |---------|-------|-------|
    | b2      | 36.80 | 43.46 |
    | l2      | 18.77 | 22.75 |
    | xl2     | 17.43 | 19.65 |
"""

from ml_collections import ConfigDict

from diversedit_jax.configs import default, variants


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the paper's Table A1."""
    size, resolution, _ = variants.read(variant)
    config = default.get_config()
    side = int(resolution) // 8  # latents of the SD-VAE
    config.data.shape = (side, side, 4)
    config.model.update({"size": variants.SIZES[size], "patch": 2, "dtype": "bfloat16"})
    return config

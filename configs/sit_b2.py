"""SiT-B/2 on ImageNet latents, 256 pixels (`:512` for 512), 400K steps: the paper's baseline.

    python -m diversedit_jax.train --config=configs/sit_b2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Tables 1 and A3: FID-50K, SDE 250 steps, no guidance): 36.80 at 256, 43.46 at 512.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(resolution: str = "256") -> ConfigDict:
    """The recipe of the paper's Table A1 for `256` or `512` pixels."""
    config = default.get_config()
    if resolution not in ("256", "512"):
        raise ValueError(f"resolution must be 256 or 512, given {resolution!r}")
    side = int(resolution) // 8  # latents of the SD-VAE
    config.data.shape = (side, side, 4)
    config.model.update({"size": "B", "patch": 2, "dtype": "bfloat16"})
    return config

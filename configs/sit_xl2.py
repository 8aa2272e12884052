"""SiT-XL/2 on ImageNet latents, 256 pixels (`:512` for 512), 400K steps: the paper's baseline.

    python -m diversedit_jax.train --config=configs/sit_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Tables 1 and A3: FID-50K, SDE 250 steps, no guidance): 17.43 at 256, 19.65 at 512.
"""

from ml_collections import ConfigDict

from configs import sit_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-B/2's recipe for `256` or `512` pixels, with the larger model."""
    config = sit_b2.get_config(resolution)
    config.model.size = "XL"
    return config

"""DiT-XL/2 on ImageNet latents, 256 pixels (`:512` for 512): discrete diffusion with learned variance.

    python -m diversedit_jax.train --config=configs/dit_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; its authors used a TPU v3-256.
Expected at 7M steps (arXiv 2212.09748: FID-50K, 250 DDPM steps, guidance 1.5 on 3 channels): 2.27 at 256.
"""

from ml_collections import ConfigDict

from configs import sit_xl2
from diversedit_jax.config import slot


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-XL/2's recipe for `256` or `512` pixels, with DiT's objective, output and sampler."""
    config = sit_xl2.get_config(resolution)
    config.total_steps = 7_000_000
    config.data.mirror = True
    config.model.out_channels = 8  # the noise and its variance
    config.objective = slot("objectives", "ddpm")
    config.optim.clip = None
    config.sampler.update({"solver": "ddpm", "cfg_scale": 1.5, "guidance_channels": 3})
    return config

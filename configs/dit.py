"""DiT-XL/2 on ImageNet latents: discrete diffusion with learned variance (arXiv 2212.09748).

    python -m diversedit_jax.train --config=configs/dit.py:512 --workdir=DIR --config.data.data_dir=LATENTS

Variant: a resolution (256, 512); 256 by default.
Hardware: a TPU v4-32, v5e-16 (--config.mesh.fsdp=4) or larger slice, or 8 GPUs; its authors used a TPU v3-256.
Expected: FID-50K 2.27 at 256 after 7M steps, with 250 DDPM steps and guidance 1.5 on 3 channels.
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import sit, variants


def get_config(variant: str = "") -> ConfigDict:
    """SiT-XL/2's recipe with DiT's objective, output and sampler."""
    config = sit.get_config(",".join(variants.read(variant, sizes=("xl2",))[:2]))
    config.total_steps = 7_000_000
    config.data.mirror = True
    config.model.out_channels = 8  # the noise and its variance
    config.objective = slot("objectives", "ddpm")
    config.optim.clip = None
    config.sampler.update({"solver": "ddpm", "cfg_scale": 1.5, "guidance_channels": 3})
    return config

"""REG on SiT-XL/2: the image denoised together with DINOv2's class token, 256 pixels (`:512` for 512), 4M steps.

    python -m diversedit_jax.train --config=configs/reg_xl2.py --workdir=DIR --config.data.data_dir=LATENTS \
        --config.encoders.dinov2.file=DINOV2_B

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs. The data hold the images too (`image`).
Expected at 4M steps (arXiv 2507.01467: FID-50K, SDE 250 steps, guidance as below): 1.36 at 256.
"""

from ml_collections import ConfigDict

from configs import reg_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """REG-B/2's recipe for `256` or `512` pixels, with the larger model, REPA in its block 8, and guidance."""
    config = reg_b2.get_config(resolution)
    config.total_steps = 4_000_000
    config.model.size = "XL"
    config.losses.repa.block = 8
    config.sampler.update({"cfg_scale": 2.3, "token_cfg_scale": 2.3, "guidance_interval": (0.0, 0.85)})
    return config

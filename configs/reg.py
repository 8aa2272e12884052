"""REG on SiT: the image is denoised together with DINOv2's class token (arXiv 2507.01467). REPA is part of it.

    python -m diversedit_jax.train --config=configs/reg.py:xl2 --workdir=DIR --config.data.data_dir=LATENTS \\
        --config.encoders.dinov2.file=DINOV2_B

Variant: a size (b2, xl2), a resolution (256, 512) and `diversedit`; b2 and 256 by default. The data hold the images too
(tools/prepare_latents.py --image=jpeg).
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs.
Expected: FID-50K 1.36 of xl2 at 256 after 4M steps, SDE with 250 steps and guidance 2.3 for t <= 0.85. Other variants
have no published score.
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, sit, variants

BLOCKS = {"b2": 4, "xl2": 8}


def get_config(variant: str = "") -> ConfigDict:
    """SiT's recipe, or DiverseDiT's, with what REG adds."""
    size, resolution, added = variants.read(variant, "diversedit", sizes=tuple(BLOCKS))
    config = sit.get_config(f"{size},{resolution}")
    config.objective = slot("objectives", "reg", width=768)  # of DINOv2-B's class token
    config.data.image = True
    config.encoders.dinov2 = slot("encoders", "dinov2")
    options = {"encoder": "dinov2", "block": BLOCKS[size], "coefficient": 0.5, "class_token": True}
    config.losses.repa = slot("losses", "repa", **options)
    if size == "xl2":
        config.total_steps = 4_000_000
        config.sampler.update({"cfg_scale": 2.3, "token_cfg_scale": 2.3, "guidance_interval": (0.0, 0.85)})
    return diversedit.diversify(config) if added else config

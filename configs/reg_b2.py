"""REG on SiT-B/2: the image denoised together with DINOv2's class token, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/reg_b2.py --workdir=DIR --config.data.data_dir=LATENTS \
        --config.encoders.dinov2.file=DINOV2_B

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs. The data hold the images too (`image`).
Expected: no score of this size is known to us; REPA alone has 24.4 at 400K steps (arXiv 2410.06940: no guidance).
"""

from ml_collections import ConfigDict

from configs import sit_b2
from diversedit_jax.config import slot


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-B/2's recipe for `256` or `512` pixels, with what REG adds (arXiv 2507.01467), REPA among it."""
    config = sit_b2.get_config(resolution)
    config.model.token_width = 768  # of DINOv2-B
    config.objective = slot("objectives", "reg")
    config.data.image = True
    config.encoders.dinov2 = slot("encoders", "dinov2")
    config.losses.repa = slot("losses", "repa", encoder="dinov2", block=4, coefficient=0.5, class_token=True)
    return config

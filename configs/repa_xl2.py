"""REPA on SiT-XL/2: block 8 aligned to DINOv2-B, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/repa_xl2.py --workdir=DIR \\
        --config.data.data_dir=LATENTS --config.encoders.dinov2.file=DINOV2

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Tables 1 and A3: FID-50K, SDE 250 steps, no guidance): 8.73 at 256, 7.91 at 512.
"""

from ml_collections import ConfigDict

from configs import repa_b2, sit_xl2


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-XL/2's recipe for `256` or `512` pixels, with block 8 aligned to DINOv2-B."""
    return repa_b2.align(sit_xl2.get_config(resolution), ("dinov2", 8))

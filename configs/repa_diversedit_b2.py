"""DiverseDiT with REPA on SiT-B/2: block 5 aligned to DINOv2-B, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/repa_diversedit_b2.py --workdir=DIR \\
        --config.data.data_dir=LATENTS --config.encoders.dinov2.file=DINOV2

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Tables 1 and A3: FID-50K, SDE 250 steps, no guidance): 17.29 at 256, 23.82 at 512.
With block 8, for the diversity loss too, 23.27 at 256 (Table A4).
"""

from ml_collections import ConfigDict

from configs import diversedit_b2, repa_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """DiverseDiT-B/2's recipe for `256` or `512` pixels, with block 5 aligned to DINOv2-B."""
    return repa_b2.align(diversedit_b2.get_config(resolution), ("dinov2", 5))

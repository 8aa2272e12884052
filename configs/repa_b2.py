"""REPA on SiT-B/2: block 5 aligned to DINOv2-B, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/repa_b2.py --workdir=DIR \\
        --config.data.data_dir=LATENTS --config.encoders.dinov2.file=DINOV2

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Tables 1 and A3: FID-50K, SDE 250 steps, no guidance): 22.99 at 256, 30.13 at 512.
With block 8 the paper has 27.94 at 256 (Table A4); REPA's authors align block 4 and have 24.4 (arXiv 2410.06940).
"""

from ml_collections import ConfigDict

from configs import sit_b2
from diversedit_jax.config import slot


def align(config: ConfigDict, *pairs: tuple[str, int]) -> ConfigDict:
    """A recipe with REPA: for each (encoder, block) an alignment, weighted as the released code averages over them."""
    config.data.image = True
    for encoder, block in pairs:
        config.encoders[encoder] = slot("encoders", encoder)
        label = "repa" if len(pairs) == 1 else f"repa_{encoder}_{block}"
        options = {"encoder": encoder, "block": block, "coefficient": 0.5 / len(pairs), "dtype": "bfloat16"}
        config.losses[label] = slot("losses", "repa", **options)
    if "diversity" in config.losses:  # whose released pairs then depend on the block
        config.losses.diversity.aligned = pairs[0][1]
    return config


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-B/2's recipe for `256` or `512` pixels, with block 5 aligned to DINOv2-B."""
    return align(sit_b2.get_config(resolution), ("dinov2", 5))

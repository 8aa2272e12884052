"""DiverseDiT on SiT-XL/2: long residual connections and the diversity loss, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/diversedit_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Tables 1 and A3: FID-50K, SDE 250 steps, no guidance): 12.42 at 256, 17.68 at 512.
"""

from ml_collections import ConfigDict

from configs import sit_xl2
from diversedit_jax.config import slot


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-XL/2's recipe for `256` or `512` pixels, with what DiverseDiT adds, as its authors released it."""
    config = sit_xl2.get_config(resolution)
    config.model.skip = "release"
    # The published runs took the loss's statistics per GPU: 8 groups of 32 examples.
    config.losses.diversity = slot("losses", "diversity", preset="release", groups=8)
    return config

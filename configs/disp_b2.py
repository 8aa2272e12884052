"""Dispersive Loss on SiT-B/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/disp_b2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs.
Expected at 400K steps (arXiv 2506.09027: FID-50K, ODE, no guidance; sample with --solver=dopri5): 32.35 at 256, where
its authors' SiT-B/2 has 36.49. Nobody has published a score at 512.
"""

from ml_collections import ConfigDict

from configs import sit_b2
from diversedit_jax.config import slot


def disperse(config: ConfigDict, block: int) -> ConfigDict:
    """A recipe with Dispersive Loss as the paper has it: coefficient and tau 0.5, 16 examples at a time."""
    config.losses.dispersive = slot("losses", "dispersive", blocks=(block,), groups=config.batch_size // 16)
    config.optim.b2 = 0.95
    return config


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-B/2's recipe for `256` or `512` pixels, with Dispersive Loss on block 3."""
    return disperse(sit_b2.get_config(resolution), block=3)

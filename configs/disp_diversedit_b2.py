"""DiverseDiT with Dispersive Loss on SiT-B/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/disp_diversedit_b2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 400K steps (paper, Table 9: FID-50K, SDE 250 steps, no guidance): 24.98 at 256; 512 is not published.
"""

from ml_collections import ConfigDict

from configs import diversedit_b2
from diversedit_jax.config import slot


def disperse(config: ConfigDict, last: int) -> ConfigDict:
    """A recipe with Dispersive Loss as its authors' PyTorch code has it: the last block, 32 examples at a time.

    Which settings DiverseDiT's experiments took is not published; their author reports this code's plateau, -ln 32.
    """
    options = {"coefficient": 0.25, "tau": 1.0, "groups": config.batch_size // 32}
    config.losses.dispersive = slot("losses", "dispersive", blocks=(last,), **options)
    return config


def get_config(resolution: str = "256") -> ConfigDict:
    """DiverseDiT-B/2's recipe for `256` or `512` pixels, with Dispersive Loss on the last block."""
    return disperse(diversedit_b2.get_config(resolution), last=12)

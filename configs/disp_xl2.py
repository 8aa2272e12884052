"""Dispersive Loss on SiT-XL/2, 256 pixels (`:512` for 512), 400K steps.

    python -m diversedit_jax.train --config=configs/disp_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs.
Expected at 400K steps (arXiv 2506.09027: FID-50K, ODE, guidance 1.5; sample with --solver=dopri5 --cfg_scale=1.5): 5.09
at 256, where its authors' SiT-XL/2 has 6.02. Nobody has published a score at 512.
"""

from ml_collections import ConfigDict

from configs import disp_b2, sit_xl2


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-XL/2's recipe for `256` or `512` pixels, with Dispersive Loss on block 7."""
    return disp_b2.disperse(sit_xl2.get_config(resolution), block=7)

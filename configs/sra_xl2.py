"""SRA on SiT-XL/2: alignment to the EMA network's later block, 256 pixels, 4M steps (`:512` for 512, 2M).

    python -m diversedit_jax.train --config=configs/sra_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs.
Expected (arXiv 2505.02831: FID-50K, SDE 250 steps, guidance 1.8 for t <= 0.7): at 256 pixels 1.85 at 2M steps, which
are 400 epochs, and 1.58 at 4M; at 512, with guidance 2.5, 2.17 at 1M and 2.07 at 2M.
"""

from ml_collections import ConfigDict

from configs import sit_xl2, sra_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """SiT-XL/2's recipe for `256` or `512` pixels, with SRA from block 8 to 20."""
    config = sra_b2.distil(sit_xl2.get_config(resolution), block=8, teacher_block=20)
    config.total_steps = 4_000_000 if resolution == "256" else 2_000_000
    config.sampler.update({"cfg_scale": 1.8 if resolution == "256" else 2.5, "guidance_interval": (0.0, 0.7)})
    return config

"""MeanFlow-XL/2 on ImageNet latents, 256 pixels (`:512` for 512), 240 epochs: images in one step.

    python -m diversedit_jax.train --config=configs/mean_flow_xl2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; the authors of DiverseDiT used 8 H800.
Expected at 256 (FID-50K, 1 step): 5.94 at 400K steps, which are 80 epochs (arXiv 2603.04239, Table 4), and 3.43 at 1.2M
(arXiv 2505.13447, Table 2). Nobody has published a score at 512.
"""

from ml_collections import ConfigDict

from configs import mean_flow_b2


def get_config(resolution: str = "256") -> ConfigDict:
    """MeanFlow-B/2's recipe for `256` or `512` pixels, with the larger model and its guidance."""
    config = mean_flow_b2.get_config(resolution)
    config.model.size = "XL"
    # at a scale of 0.2 / (1 - 0.92) = 2.5
    config.objective.update({"omega": 0.2, "kappa": 0.92, "guidance_interval": (0.0, 0.75)})
    return config

"""MeanFlow-B/2 on ImageNet latents, 256 pixels (`:512` for 512), 240 epochs: images in one step.

    python -m diversedit_jax.train --config=configs/mean_flow_b2.py --workdir=DIR --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the authors of DiverseDiT used 8 H800.
Expected at 256 (FID-50K, 1 step): 9.44 at 400K steps, which are 80 epochs (arXiv 2603.04239, Table 4), and 6.17 at 1.2M
(arXiv 2505.13447, Table 2). Nobody has published a score at 512.
"""

from ml_collections import ConfigDict

from configs import sit_b2
from diversedit_jax.config import slot


def get_config(resolution: str = "256") -> ConfigDict:
    """The recipe of MeanFlow's authors for `256` or `512` pixels.

    They train in float32, and so does this: du/dt is a derivative, in which bfloat16's rounding grows. On hardware for
    which that is too slow, set config.model.dtype = "bfloat16"; softmax, norms and embeddings are float32 anyway.
    """
    config = sit_b2.get_config(resolution)
    config.total_steps = 1_200_000
    config.model.update({"second_time": True, "dtype": "float32"})
    config.objective = slot("objectives", "mean_flow", omega=1.0, kappa=0.5)  # a scale of 2
    config.optim.update({"b2": 0.95, "clip": None})
    config.sampler.update({"solver": "mean_flow", "steps": 1})
    return config

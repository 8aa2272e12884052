"""MeanFlow on ImageNet latents: images in one step (arXiv 2505.13447).

    python -m diversedit_jax.train --config=configs/mean_flow.py:xl2,diversedit --workdir=DIR \\
        --config.data.data_dir=LATENTS

Variant: a size (b2, l2, xl2), a resolution (256, 512) and `diversedit`; b2 and 256 by default.
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs; DiverseDiT's authors used 8 H800.
Expected: FID-50K with one step at 256, after 400K steps (80 epochs; arXiv 2603.04239, Table 4) and after 1.2M (240
epochs; arXiv 2505.13447, Table 2). The 2.99 is from arXiv 2603.04239, Table 5, which does not give its length.

    | variant        | 400K | 1.2M |
    |----------------|------|------|
    | b2             | 9.44 | 6.17 |
    | l2             | 8.73 | 3.84 |
    | xl2            | 5.94 | 3.43 |
    | b2,diversedit  | 8.51 |      |
    | l2,diversedit  | 7.15 |      |
    | xl2,diversedit | 5.69 | 2.99 |
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, sit, variants

GUIDANCE = {
    "b2": {"omega": 1.0, "kappa": 0.5},  # a scale of 1 / (1 - 0.5) = 2
    "l2": {"omega": 0.2, "kappa": 0.92, "guidance_interval": (0.0, 0.8)},  # a scale of 0.2 / (1 - 0.92) = 2.5
    "xl2": {"omega": 0.2, "kappa": 0.92, "guidance_interval": (0.0, 0.75)},
}


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of MeanFlow's authors.

    It trains in float32, as theirs does: du/dt is a derivative, in which bfloat16's rounding grows. Where that is too
    slow, set config.model.dtype = "bfloat16"; softmax, norms and embeddings stay float32.
    """
    size, resolution, added = variants.read(variant, "diversedit")
    config = sit.get_config(f"{size},{resolution}")
    config.total_steps = 1_200_000
    config.model.dtype = "float32"
    config.objective = slot("objectives", "mean_flow", **GUIDANCE[size])
    config.optim.update({"b2": 0.95, "clip": None})
    config.sampler.update({"solver": "mean_flow", "steps": 1})
    if added:  # the first examples of each of the loss's groups have r = t; the features are the differentiated pass's
        config.objective.groups = 8
        diversedit.diversify(config)
    return config

"""DiverseDiT on MeanFlow-XL/2: long residual connections and diversity loss, 256 pixels (`:512` for 512), 240 epochs.

    python -m diversedit_jax.train --config=configs/mean_flow_diversedit_xl2.py --workdir=DIR \\
        --config.data.data_dir=LATENTS

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 256 (arXiv 2603.04239, FID-50K, 1 step): 5.69 at 400K steps, or 80 epochs (Table 4; 5.94 without), and 2.99
in the end (Table 5; 3.43 without), whose length is not given: MeanFlow has its 3.43 at 1.2M steps, or 240 epochs.
"""

from ml_collections import ConfigDict

from configs import mean_flow_xl2
from diversedit_jax.config import slot


def get_config(resolution: str = "256") -> ConfigDict:
    """MeanFlow-XL/2's recipe for `256` or `512` pixels, with what DiverseDiT adds, as its authors released it."""
    config = mean_flow_xl2.get_config(resolution)
    config.model.skip = "release"
    # The published runs took the loss's statistics per GPU: 8 groups of 32 examples, the first of each with r = t.
    # The features are those of the differentiated pass; which pass the authors read is not published.
    config.objective.groups = 8
    config.losses.diversity = slot("losses", "diversity", preset="release", groups=8)
    return config

"""DiverseDiT on SiT: long residual connections and the representation-diversity loss (arXiv 2603.04239).

    python -m diversedit_jax.train --config=configs/diversedit.py:xl2,512 --workdir=DIR --config.data.data_dir=LATENTS

Variant: a size (b2, l2, xl2), a resolution (256, 512) and `gated`, a form of ours (see `gated`); b2 and 256 by default.
The recipes of other methods take the word `diversedit`: configs/repa.py:xl2,diversedit.
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs; the paper used 8 H800.
Expected: FID-50K after 400K steps, SDE with 250 steps, no guidance (paper, Tables 1 and A3). `gated` has no score.

    | variant |   256 |   512 |
    |---------|-------|-------|
    | b2      | 28.05 | 33.18 |
    | l2      | 16.10 | 19.19 |
    | xl2     | 12.42 | 17.68 |
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import sit, variants


def diversify(config: ConfigDict) -> ConfigDict:
    """Add DiverseDiT to a recipe, as its authors released it."""
    config.model.skip = "release"
    # The published runs took the loss's statistics per GPU: 8 groups of 32 examples.
    config.losses.diversity = slot("losses", "diversity", preset="release", groups=8)
    return config


def gated(config: ConfigDict) -> ConfigDict:
    """Add both parts in a form of ours that does not slow down early training.

    Each long residual connection is a gate for each channel, zero at first. The loss compares what blocks add to the
    stream, over all pairs; an offset that all tokens share cannot satisfy it. The evidence is small runs only
    (tools/studies/README.md): after 400 steps the Frechet distance is 0.709 [0.595, 0.844] times that of the released
    form, and 1.000 [0.936, 1.068] times that of SiT.
    """
    config.model.skip = "gate"
    config.losses.diversity = slot("losses", "diversity", preset="updates", groups=8)
    return config


def get_config(variant: str = "") -> ConfigDict:
    """SiT's recipe with DiverseDiT."""
    size, resolution, added = variants.read(variant, "gated")
    return (gated if added else diversify)(sit.get_config(f"{size},{resolution}"))

"""REG and DiverseDiT on SiT-XL/2: class token, long residual connections and diversity loss, 256 pixels (`:512` for
512), 4M steps.

    python -m diversedit_jax.train --config=configs/reg_diversedit_xl2.py --workdir=DIR \
        --config.data.data_dir=LATENTS --config.encoders.dinov2.file=DINOV2_B

Hardware: made for a TPU v4-32, v5e-16 (mesh.fsdp=4) or larger slice, or 8 GPUs. The data hold the images too (`image`).
Expected: nothing is published of the two together; REG alone reaches FID-50K 1.36 (configs/reg_xl2.py).
"""

from ml_collections import ConfigDict

from configs import reg_xl2
from diversedit_jax.config import slot


def get_config(resolution: str = "256") -> ConfigDict:
    """REG-XL/2's recipe for `256` or `512` pixels, with what DiverseDiT adds, as its authors released it."""
    config = reg_xl2.get_config(resolution)
    config.model.skip = "release"
    # The published runs took the loss's statistics per GPU: 8 groups of 32 examples.
    config.losses.diversity = slot("losses", "diversity", preset="release", groups=8)
    return config

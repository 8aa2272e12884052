"""A released SiT becomes a DiverseDiT: long residual connections that change nothing at first, and the diversity loss.

    python -m diversedit_jax.train --config=configs/finetune.py:xl2,256 --workdir=DIR \\
        --config.data.data_dir=LATENTS --config.init_from.file=SiT-XL-2-256.pt

Variant: a size (xl2, l2, b2), a resolution (256, 512) and `gated`, a form of ours (see diversedit.py); xl2 and 256 by
default. The official release has the size xl2. With 512, its positions at 256 are spread over the larger grid. The page
configs/finetuning.md goes through it, command by command.
Hardware: as configs/diversedit.py: a TPU v4-32, v5e-16 or larger slice (--config.mesh.fsdp=4), or 8 GPUs.
Expected: nobody has trained it, and the paper has no such row. Its outputs are those of the release at first, so its
scores begin there (FID-50K about 8.3: SDE with 250 steps, no guidance). Whether they get better is open. On the digits
they did not (tools/studies/README.md).
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default, variants
from diversedit_jax.configs.diversedit import diversify, gated
from diversedit_jax.training import optimizer

GRID = 16  # patches along a side of a release at 256 pixels


def get_config(variant: str = "") -> ConfigDict:
    """The official SiT with both parts of DiverseDiT, its own weights at a tenth of the published learning rate."""
    size, resolution, added = variants.read(variant, "gated", sizes=("xl2", "l2", "b2"))
    config = default.get_config()
    config.total_steps = 50_000
    side = int(resolution) // 8  # latents of the SD-VAE
    config.data.shape = (side, side, 4)
    config.model = slot("models", "official_sit", size=variants.SIZES[size], patch=2, dtype="bfloat16")
    config.init_from.family = "official_sit"
    (gated if added else diversify)(config)
    if not added:
        config.model.skip_init = "identity"  # a gate is zero at first, too
    config.losses.diversity.warmup_steps = 5_000  # the connections begin to learn before it counts
    if side // 2 != GRID:
        config.model.base_grid = GRID
    config.optim.update({"learning_rate": 1e-5, "warmup_steps": 1_000})
    config.groups.new = optimizer.group("^params/merges/", learning_rate=1e-4, warmup_steps=1_000)
    config.checkpoint.update({"every": 2_500, "keep_every": 10_000})
    config.samples.every = 2_500
    return config

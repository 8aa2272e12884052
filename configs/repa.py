"""REPA on SiT: features of one block aligned to those of DINOv2-B (arXiv 2410.06940).

    python -m diversedit_jax.train --config=configs/repa.py:xl2,diversedit --workdir=DIR \\
        --config.data.data_dir=LATENTS --config.encoders.dinov2.file=DINOV2

Variant: a size (b2, l2, xl2), a resolution (256, 512) and `diversedit`; b2 and 256 by default. Block 5 of b2, and 8 of
l2 and xl2, is aligned.
Hardware: a TPU v4-32, v5e-16 or larger slice (xl2: --config.mesh.fsdp=4), or 8 GPUs; the paper used 8 H800.
Expected: FID-50K after 400K steps, SDE with 250 steps, no guidance (arXiv 2603.04239, Tables 1 and A3). With block 8
aligned, b2 has 27.94, and 23.27 with DiverseDiT (Table A4). REPA's authors align block 4 of b2 and have 24.4.

    | variant        |   256 |   512 |
    |----------------|-------|-------|
    | b2             | 22.99 | 30.13 |
    | l2             |  9.57 | 10.82 |
    | xl2            |  8.73 |  7.91 |
    | b2,diversedit  | 17.29 | 23.82 |
    | l2,diversedit  |  8.47 |  9.83 |
    | xl2,diversedit |  8.09 |  7.18 |

Words `encoder@block` choose the alignments, as in Table A2: 450K steps of b2 at 256. Its scores fit guidance 1.8 for
t <= 0.7, which the paper does not say. The encoders are DINOv2-B, MAE-L and MoCo v3-L. How several alignments are
weighted is not published: here 0.5 in all.

    | variant                    |  FID  | variant             |  FID  |
    |----------------------------|-------|---------------------|-------|
    | dinov2@5                   |  5.37 | dinov2@5,mae@5      |  5.77 |
    | dinov2@8                   |  7.67 | dinov2@8,mae@8      |  7.44 |
    | dinov2@10                  | 10.85 | dinov2@10,mae@10    | 11.03 |
    | mae@5                      | 10.15 | dinov2@3,mae@8      | 11.46 |
    | mae@8                      | 11.40 | dinov2@5,mae@10     | 11.73 |
    | mae@10                     | 12.11 | dinov2@3,moco_v3@8  | 11.36 |
    | dinov2@2,dinov2@5,dinov2@8 | 13.25 | dinov2@5,moco_v3@10 | 12.71 |
    | dinov2@3,dinov2@6,dinov2@9 | 13.54 |                     |       |
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, sit, variants
from diversedit_jax.errors import ConfigError

BLOCKS = {"b2": 5, "l2": 8, "xl2": 8}


def align(config: ConfigDict, *pairs: tuple[str, int]) -> ConfigDict:
    """Add REPA to a recipe: an alignment for each (encoder, block), with equal weights as in the released code."""
    config.data.image = True
    for encoder, block in pairs:
        config.encoders[encoder] = slot("encoders", encoder)
        label = "repa" if len(pairs) == 1 else f"repa_{encoder}_{block}"
        options = {"encoder": encoder, "block": block, "coefficient": 0.5 / len(pairs), "dtype": "bfloat16"}
        config.losses[label] = slot("losses", "repa", **options)
    if "diversity" in config.losses:  # its released pairs depend on the aligned block
        config.losses.diversity.aligned = pairs[0][1]
    return config


def get_config(variant: str = "") -> ConfigDict:
    """SiT's recipe, or DiverseDiT's, with REPA."""
    words = variant.split(",")
    chosen = [word.partition("@")[::2] for word in words if "@" in word]
    if not all(encoder and block.isdecimal() for encoder, block in chosen):
        raise ConfigError(f"variant {variant!r}: an alignment is encoder@block, such as dinov2@5")
    size, resolution, added = variants.read(",".join(word for word in words if "@" not in word), "diversedit")
    config = sit.get_config(f"{size},{resolution}")
    if added:
        diversedit.diversify(config)
    if chosen:  # Table A2
        config.total_steps = 450_000
        config.sampler.update({"cfg_scale": 1.8, "guidance_interval": (0.0, 0.7)})
    return align(config, *([(encoder, int(block)) for encoder, block in chosen] or [("dinov2", BLOCKS[size])]))

"""REPA on SiT-B/2 with several alignments, `encoder@block,encoder@block`: the paper's Table A2, 256 pixels, 450K steps.

    python -m diversedit_jax.train --config=configs/repa_multi_b2.py:dinov2@2,dinov2@5,dinov2@8 --workdir=DIR \\
        --config.data.data_dir=LATENTS --config.encoders.dinov2.file=DINOV2

Hardware: made for a TPU v4-32, v5e-16 or larger slice, or 8 GPUs; the paper used 8 H800.
Expected at 450K steps (FID-50K, SDE 250 steps; the table fits guidance 1.8 for t <= 0.7, which the paper does not say):

    dinov2@5                     5.37    dinov2@5,mae@5        5.77
    dinov2@8                     7.67    dinov2@8,mae@8        7.44
    dinov2@10                   10.85    dinov2@10,mae@10     11.03
    mae@5                       10.15    dinov2@3,mae@8       11.46
    mae@8                       11.40    dinov2@5,mae@10      11.73
    mae@10                      12.11    dinov2@3,moco_v3@8   11.36
    dinov2@2,dinov2@5,dinov2@8  13.25    dinov2@5,moco_v3@10  12.71
    dinov2@3,dinov2@6,dinov2@9  13.54

The encoders are DINOv2-B, MAE-L and MoCo v3-L. The weights of several alignments are not published: here 0.5 in all.
"""

from ml_collections import ConfigDict

from configs import repa_b2, sit_b2


def get_config(alignments: str = "dinov2@2,dinov2@5,dinov2@8") -> ConfigDict:
    """SiT-B/2's recipe at 256 pixels, with REPA on the blocks (counted from 1) and encoders in `alignments`."""
    pairs = [alignment.partition("@") for alignment in alignments.split(",")]
    if not all(encoder and block.isdecimal() for encoder, _, block in pairs):
        raise ValueError(f"wanted encoder@block,encoder@block ..., given {alignments!r}")
    config = repa_b2.align(sit_b2.get_config(), *[(encoder, int(block)) for encoder, _, block in pairs])
    config.total_steps = 450_000
    config.sampler.update({"cfg_scale": 1.8, "guidance_interval": (0.0, 0.7)})
    return config

"""How papers evaluate: the sampler, the rule of the labels and the rounding behind their tables.

The scores of a paper also depend on its weights, on its autoencoder (SiT, DiT and SRA decode with sd-vae-ft-ema, REPA,
DiverseDiT and MeanFlow with sd-vae-ft-mse) and on ADM's evaluator with VIRTUAL_imagenet256_labeled.npz. Those of
MS-COCO compare with statistics of its 40,504 held-out images, by tools.reference_stats --crop=lanczos. All sampling is
in float32, and FID has ADM's Inception and resizing: U-ViT's own evaluator resizes as PyTorch does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

NUM = 50_000


class Protocol(NamedTuple):
    """A protocol of `num` samples. sampler: options of `sampler.make`. labels: a rule of `conditioning.RULES`."""

    about: str
    sampler: Mapping[str, Any]
    labels: str = "uniform"
    rounding: str = "floor"
    num: int = NUM


_PLAIN = {"cfg_scale": 1.0, "guidance_interval": (0.0, 1.0), "guidance_channels": None}
_ONE_STEP = _PLAIN | {"solver": "mean_flow", "steps": 1}
_DDPM = _PLAIN | {"solver": "ddpm", "steps": 250}
_SDE = _PLAIN | {"solver": "euler_maruyama", "steps": 250, "diffusion": "sigma"}
_SDE |= {"last_step_kind": "mean", "last_step": 0.04}
_GUIDED = {"cfg_scale": 1.5, "guidance_channels": 3}
_ODE = _PLAIN | {"solver": "euler", "steps": 50}
_DPM = _PLAIN | {"solver": "dpm_solver_pp", "steps": 50}
_TEXT = {"cfg_scale": 2.0}  # REPA's, for MS-COCO. U-ViT writes it as s = 1: noise = cond + s (cond - uncond)

PROTOCOLS = {
    "adm": Protocol("ADM's: 250 steps of ancestral DDPM, no guidance", _DDPM),
    "dit": Protocol("DiT's tables: 250 DDPM steps, guidance 1.5 on 3 channels", _DDPM | _GUIDED, rounding="nearest"),
    "sit": Protocol("SiT's tables: 250 SDE steps, guidance 1.5 on 3 channels", _SDE | _GUIDED, rounding="nearest"),
    "unguided": Protocol("SiT, REPA and DiverseDiT without guidance: 250 SDE steps", _SDE),
    "repa": Protocol(
        "REPA's and DiverseDiT's main tables: 250 SDE steps, guidance 1.8 where t is in [0, 0.7]",
        _SDE | {"cfg_scale": 1.8, "guidance_interval": (0.0, 0.7)},
    ),
    "diversedit": Protocol("DiverseDiT's tables A4 to A10: 250 SDE steps, guidance 1.35", _SDE | {"cfg_scale": 1.35}),
    "reg": Protocol(
        "REG's main table: 250 SDE steps, guidance 2.3 of image and class token where t is in [0, 0.85]",
        _SDE | {"cfg_scale": 2.3, "token_cfg_scale": 2.3, "guidance_interval": (0.0, 0.85)},
    ),
    "meanflow": Protocol("MeanFlow's tables: one step, no guidance on top", _ONE_STEP, rounding="nearest"),
    "coco30k": Protocol(
        "MS-COCO: 30,000 captions, each of another held-out image, drawn by the seed; 50 Euler steps, guidance 2",
        _ODE | _TEXT,
        "shuffled",
        "nearest",
        30_000,
    ),
    "uvit": Protocol(
        "U-ViT's MS-COCO: the captions of coco30k; 50 evaluations of DPM-Solver++, guidance 2",
        _DPM | _TEXT,
        "shuffled",
        "nearest",
        30_000,
    ),
    "repa_coco": Protocol(
        "REPA's MS-COCO, ODE: the first captions of 40,192 held-out images in order; 50 Euler steps, guidance 2",
        _ODE | _TEXT,
        "data",
        num=40_192,
    ),
    "repa_coco_sde": Protocol(
        "REPA's MS-COCO, SDE: the captions of repa_coco; 250 SDE steps, guidance 2", _SDE | _TEXT, "data", num=40_192
    ),
}

"""How papers evaluate, by name: the sampler, the rule of the labels and the rounding behind a row of their tables.

The scores that a paper prints also rest on its weights, its autoencoder (SiT, DiT and SRA decode with sd-vae-ft-ema,
REPA, DiverseDiT and MeanFlow with sd-vae-ft-mse) and the evaluator of ADM with VIRTUAL_imagenet256_labeled.npz.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion


class Protocol(NamedTuple):
    """A protocol of 50,000 samples. sampler: options of `sampling.make`. labels: a rule of `sampling.LABELS`."""

    about: str
    sampler: Mapping[str, Any]
    labels: str = "uniform"
    rounding: str = "floor"


_SDE = {"solver": "euler_maruyama", "steps": 250, "diffusion": "sigma", "last_step_kind": "mean", "last_step": 0.04}
_PLAIN = {"cfg_scale": 1.0, "guidance_interval": (0.0, 1.0), "guidance_channels": None}

PROTOCOLS = {
    "adm": Protocol("ADM's: 250 steps of ancestral DDPM, no guidance", _PLAIN | {"solver": "ddpm", "steps": 250}),
    "dit": Protocol(
        "DiT's tables: 250 steps of DDPM, guidance 1.5 on 3 of 4 channels",
        _PLAIN | {"solver": "ddpm", "steps": 250, "cfg_scale": 1.5, "guidance_channels": 3},
        rounding="nearest",
    ),
    "sit": Protocol(
        "SiT's tables: 250 SDE steps, guidance 1.5 on 3 of 4 channels",
        _PLAIN | _SDE | {"cfg_scale": 1.5, "guidance_channels": 3},
        rounding="nearest",
    ),
    "unguided": Protocol("SiT, REPA and DiverseDiT without guidance: 250 SDE steps", _PLAIN | _SDE),
    "repa": Protocol(
        "REPA's and DiverseDiT's main tables: 250 SDE steps, guidance 1.8 where t is in [0, 0.7]",
        _PLAIN | _SDE | {"cfg_scale": 1.8, "guidance_interval": (0.0, 0.7)},
    ),
    "diversedit": Protocol(
        "DiverseDiT's tables A4 to A10: 250 SDE steps, guidance 1.35 at all times", _PLAIN | _SDE | {"cfg_scale": 1.35}
    ),
    "reg": Protocol(
        "REG's main table: 250 SDE steps, guidance 2.3 of image and class token where t is in [0, 0.85]",
        _PLAIN | _SDE | {"cfg_scale": 2.3, "token_cfg_scale": 2.3, "guidance_interval": (0.0, 0.85)},
    ),
    "meanflow": Protocol(
        "MeanFlow's tables: one step, no guidance beside the trained one",
        _PLAIN | {"solver": "mean_flow", "steps": 1},
        rounding="nearest",
    ),
}


def find(name: str) -> Protocol:
    """The protocol `name`; an unknown name is an error that lists the known ones."""
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown preset {name!r}; {suggestion(name, PROTOCOLS)}")
    return PROTOCOLS[name]

"""Auxiliary losses on the features of a network's blocks, one published loss per file. They need jax alone.

    loss, parts = diversity_loss(features)                # DiverseDiT: outputs of your blocks, [b n d] each
    loss = repa_loss(project(params, block), targets)     # REPA: tokens of one block, tokens of an encoder -> [b]
    loss = sra_loss(student, teacher)                     # SRA: tokens of one block, of a later one -> [b]
    loss = dispersive_loss(block)                         # Dispersive Loss

`init_projector` gives the parameters of `project`. DIVERSITY_PRESETS are the published readings of DiverseDiT's loss.
"""

from functools import partial

from diversedit_jax import registry
from diversedit_jax.losses.dispersive import dispersive_loss
from diversedit_jax.losses.diversity import PRESETS as DIVERSITY_PRESETS
from diversedit_jax.losses.diversity import diversity_loss
from diversedit_jax.losses.repa import init_projector, project, repa_loss
from diversedit_jax.losses.sra import sra_loss

__all__ = [
    "DIVERSITY_PRESETS",
    "dispersive_loss",
    "diversity_loss",
    "init_projector",
    "make",
    "project",
    "repa_loss",
    "sra_loss",
]

# make(name, **options): the auxiliary loss `name`; the options are the keywords of `losses.<name>.make`.
make = partial(registry.make, "losses")

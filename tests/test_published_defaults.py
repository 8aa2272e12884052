"""Defaults and recipes that were published, each beside its source. A default that is our choice is not here."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from diversedit_jax.codecs import pixels, vae
from diversedit_jax.diffusion import solve, solvers
from diversedit_jax.diffusion.predictions import AverageVelocity, Diffusion, Flow
from diversedit_jax.losses import dispersive, diversity, repa, sra
from diversedit_jax.metrics.inception_score import inception_score
from diversedit_jax.metrics.kernel_distance import kernel_distance
from diversedit_jax.metrics.linear_probe import linear_probe
from diversedit_jax.metrics.precision_recall import precision_recall
from diversedit_jax.models import dit, uvit
from diversedit_jax.objectives import ddpm, flow_matching, mean_flow, reg
from diversedit_jax.runtime.files import flat
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer

# Words for sources: an arXiv number is a paper, "code" is the public repository of its authors.
SIT, DIT = "SiT, arXiv 2401.08740", "DiT, arXiv 2212.09748"
REPA, REG = "REPA, arXiv 2410.06940", "REG, arXiv 2507.01467"
DISPERSIVE, SRA = "Dispersive Loss, arXiv 2506.09027", "SRA, arXiv 2505.02831"
U_VIT = "U-ViT, arXiv 2209.12152"
MEAN_FLOW, DIVERSEDIT = "MeanFlow, arXiv 2505.13447", "DiverseDiT, arXiv 2603.04239"

INFONCE = {"form": "infonce_l2", "tau": 0.5, "diagonal": True, "per_element": True}
DECAY = {"coefficient": 0.2, "decay_from_epoch": 149, "decay_epochs": 1000}
GUIDED = {"omega": 1.0, "kappa": 0.5}
WEIGHED = {"power": 1.0, "eps": 0.01}
RAMP = {"lo": 0.1, "hi": 0.5, "denominator": "hi"}
STEPS = {
    "steps": 250,
    "diffusion": "sigma",  # w = 2 sigma
    "diffusion_norm": 1.0,
    "last_step_kind": "mean",
    "last_step": 0.04,
}
TOLERANCES = {"rtol": 1e-3, "atol": 1e-6}

# (a function or a mapping, its source, options)
DEFAULTS = [
    # --- Objectives.
    (flow_matching.make, f"{SIT}, section 2; {DIVERSEDIT}, Table A1", {"path": "linear", "prediction": "velocity"}),
    (flow_matching.make, f"{DIVERSEDIT}, Table A1", {"weight": "none", "time": "uniform", "condition_drop": 0.1}),
    (flow_matching.make, f"{SIT}, code: transport.py", {"time_scale": 1.0}),
    (ddpm.make, f"{DIT}, section 3.1 and code", {"num_timesteps": 1000, "condition_drop": 0.1, "learn_sigma": True}),
    (ddpm.make, f"{DIT}, code: gaussian_diffusion.py", {"betas": "linear", "first_step": 0}),
    (reg.make, f"{REG}, code", {"encoder": "dinov2", "width": 768, "token_weight": 0.03}),
    (reg.regress, f"{REG}, code", {"token_weight": 0.03}),
    (reg.make, f"{REG}, code", {"path": "linear", "time": "uniform", "condition_drop": 0.1}),
    (mean_flow.make, f"{MEAN_FLOW}, code of size B: guidance", GUIDED | {"guidance_interval": (0.0, 1.0)}),
    (mean_flow.make, f"{MEAN_FLOW}, section 4.3 and code", WEIGHED),
    (mean_flow.make, f"{MEAN_FLOW}, code", {"time": "logit_normal", "time_mean": -0.4, "time_std": 1.0, "equal": 0.75}),
    (mean_flow.make, f"{MEAN_FLOW}, code", {"positional": True, "condition_drop": 0.1, "drop": "first"}),
    (mean_flow.regress, f"{MEAN_FLOW}, code of size B", GUIDED | WEIGHED | {"interval": (0.0, 1.0)}),
    # --- Losses.
    (dispersive.make, f"{DISPERSIVE}, of size B", INFONCE | {"blocks": (3,), "coefficient": 0.5}),
    (dispersive.dispersive_loss, DISPERSIVE, INFONCE),
    (repa.make, f"{REPA}, and code; block 8 is of L and XL", {"encoder": "dinov2", "block": 8, "coefficient": 0.5}),
    (repa.make, f"{REPA}, code: models/sit.py", {"width": 2048}),
    (repa.make, f"{REPA}, code: loss.py", {"similarity": "cosine", "warmup_steps": 0, "until": None}),
    (repa.repa_loss, f"{REPA}, code: loss.py", {"similarity": "cosine"}),
    (sra.make, f"{SRA}, SiT-B", {"block": 3, "teacher_block": 8, "t_max": 0.2, "distance": "smooth_l1"}),
    (sra.make, f"{SRA}, 256 pixels", DECAY | {"steps_per_epoch": 5004}),
    (sra.weight_at, f"{SRA}, 256 pixels", DECAY | {"steps_per_epoch": 5004}),
    (sra.earlier, SRA, {"t_max": 0.2}),
    (sra.sra_loss, SRA, {"form": "smooth_l1"}),
    (vars(sra), f"{SRA}, code: beta of smooth L1", {"BETA": 0.05}),
    # --- The diversity loss, in its three published readings.
    (diversity.PRESETS["paper"], f"{DIVERSEDIT}, supplement B: ten layers", {"rule": "random_layers", "k": 10}),
    (
        diversity.PRESETS["paper"],
        f"{DIVERSEDIT}, Eqs. 9-12",
        {"orthogonality": "signed", "mutual_information": "signed"},
    ),
    (
        diversity.PRESETS["paper"],
        f"{DIVERSEDIT}, Eqs. 13-14: over the blocks in P, no magnitudes, no factor, no limits",
        {
            "dispersion_absolute": False,
            "dispersion_scale": 1.0,
            "dispersion_clamp": False,
            "dispersion_blocks": "selected",
        },
    ),
    (diversity.PRESETS["paper"], f"{DIVERSEDIT}, Eqs. 9-15: lambdas", {"weights": (0.33, 0.33, 0.33)}),
    (diversity.PRESETS["paper"], f"{DIVERSEDIT}, Eq. 15", RAMP | {"weight": "adaptive", "coefficient": 1.0}),
    (
        diversity.PRESETS["release"],
        f"{DIVERSEDIT}, first code: loss.py",
        {
            "rule": "release",
            "k": 10,
            "redraw": False,
            "weights": (1 / 3, 1 / 3, 1 / 3),
            "orthogonality": "signed",
            "mutual_information": "abs",
            "dispersion_absolute": True,
            "dispersion_scale": 0.25,
            "dispersion_clamp": True,
            "dispersion_blocks": "all",
        },
    ),
    (
        diversity.PRESETS["release"],
        f"{DIVERSEDIT}, first code: train.py, a gradient passes through the weight",
        RAMP | {"weight": "adaptive", "detach_weight": False, "coefficient": 1.0},
    ),
    (
        diversity.PRESETS["release_const"],
        f"{DIVERSEDIT}, code of the later branch: --block-diversity-loss-coeff",
        {"weight": "constant", "coefficient": 0.001, "rule": "release", "k": 10, "weights": (1 / 3, 1 / 3, 1 / 3)},
    ),
    (diversity.select_pairs, f"{DIVERSEDIT}, first code: loss.py", {"rule": "release", "k": 10}),
    (diversity.orthogonality, f"{DIVERSEDIT}, Eq. 10", {"of_cosine": "signed"}),
    (diversity.mutual_information, f"{DIVERSEDIT}, first code: loss.py", {"of_cosine": "abs"}),
    (diversity.dispersion, f"{DIVERSEDIT}, first code: loss.py", {"absolute": True, "scale": 0.25, "clamp": True}),
    (diversity.adaptive_weight, f"{DIVERSEDIT}, Eq. 15 and first code", RAMP | {"detach": False}),
    # --- Networks.
    (dit.make, f"{DIT}, Table 1 and code", {"mlp_ratio": 4.0, "qk_norm": False}),
    (dit.make, f"{DIVERSEDIT}, code: features after the merge", {"patch": 2, "capture": "merged"}),
    (dit.SIZES, f"{DIT}, Table 1", {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}),
    (dit.SKIPS, f"{DIVERSEDIT}, first code", {"release": ("post", True, "xavier")}),
    (dit.SKIPS, f"{DIVERSEDIT}, Eq. 8; the kernel as in the first code", {"paper": ("pre", True, "xavier")}),
    (dit.SKIPS, "Skip-DiT, arXiv 2411.17616, code", {"skip_dit": ("pre", True, "torch")}),
    (dit.SKIPS, f"{U_VIT}, code", {"uvit": ("pre", False, "trunc_normal")}),
    (uvit.make, f"{U_VIT}, code: configs", {"mlp_ratio": 4.0, "qkv_bias": False, "time_mlp": False, "skip": "uvit"}),
    (uvit.SIZES, f"{U_VIT}, Table 1 and code: configs", {"L": (20, 1024, 16, True), "H": (28, 1152, 16, False)}),
    (uvit.SIZES, f"{U_VIT}, Table 1 and code: configs", {"S": (12, 512, 8, True), "S_deep": (16, 512, 8, True)}),
    (uvit.SIZES, f"{U_VIT}, Table 1 and code: configs", {"M": (16, 768, 12, True)}),
    # --- Training.
    (optimizer.make, f"{DIVERSEDIT}, Table A1", {"learning_rate": 1e-4, "decay": "constant", "warmup_steps": 0}),
    (optimizer.make, f"{DIVERSEDIT}, Table A1", {"b1": 0.9, "b2": 0.999, "weight_decay": 0.0}),
    (optimizer.make, f"{REPA}, code: --adam-epsilon, --max-grad-norm", {"eps": 1e-8, "clip": 1.0}),
    # --- Sampling.
    (sampler.make, f"{REPA}, README and code: samplers.py", {"solver": "euler_maruyama"} | STEPS),
    (solve.Options, f"{REPA}, README and code: samplers.py", STEPS),
    (solvers.last_step_times, f"{REPA}, code: samplers.py", {"first": 1.0, "last": 0.04}),
    (solvers.solve_sde, f"{REPA}, code: samplers.py", {"diffusion": None, "last": "mean"}),
    (sampler.make, f"{DIVERSEDIT}, Table 1: no guidance", {"cfg_scale": 1.0, "guidance_interval": (0.0, 1.0)}),
    *((made, f"{SIT}, code: dopri5", TOLERANCES) for made in (sampler.make, solve.Options, solvers.dopri5)),
    *((made, f"{DIT}, code: `ddim_sample_loop`", {"eta": 0.0}) for made in (sampler.make, solve.Options)),
    (solve.DEFAULTS, f"{REPA}, README", {Flow: {"solver": "euler_maruyama"}}),
    (solve.DEFAULTS, f"{MEAN_FLOW}: one step", {AverageVelocity: {"solver": "mean_flow", "steps": 1}}),
    (solve.DEFAULTS, f"{DIT}, code: sample_ddp.py", {Diffusion: {"solver": "ddpm"}}),
    # --- Images and latents.
    (vae.make, "latent diffusion, arXiv 2112.10752, code", {"scale": 0.18215, "bias": 0.0}),
    (pixels.ROUNDINGS, f"{DIT}, code: sample_ddp.py", {"nearest": 128.0}),
    (pixels.ROUNDINGS, f"{REPA}, code: generate.py, 255 (x + 1) / 2", {"floor": 127.5}),
    # --- Scores.
    (precision_recall, "ADM, arXiv 2105.05233, code: evaluator.py", {"k": 3}),
    (inception_score, "ADM, arXiv 2105.05233, code: evaluator.py", {"split": 5000}),
    (kernel_distance, "StyleGAN2-ADA, code: metric_main.py, kid50k_full", {"subsets": 100, "subset_size": 1000}),
    (linear_probe, f"{DIVERSEDIT}, code of the later branch: analysis", {"ridge": 1e-2}),
]

ADAM_OF_MEAN_FLOW = {"optim.b2": 0.95, "optim.clip": None, "sampler.solver": "mean_flow", "sampler.steps": 1}
ALIGNED = {"losses.repa.coefficient": 0.5, "losses.repa.encoder": "dinov2"}
LAST = {"losses.dispersive.coefficient": 0.25, "losses.dispersive.tau": 1.0, "losses.dispersive.groups": 256 // 32}
OFTEN = {"losses.dispersive.coefficient": 0.5, "losses.dispersive.tau": 0.5, "losses.dispersive.groups": 256 // 16}
UP_TO = {256: (149, 1000), 512: (99, 800)}


def aligned_later(block: int, teacher_block: int, pixels: int = 256) -> dict[str, Any]:
    start, length = UP_TO[pixels]
    blocks = {"block": block, "teacher_block": teacher_block}
    options = blocks | {"coefficient": 0.2, "decay_from_epoch": start, "decay_epochs": length, "t_max": 0.2}
    return {f"losses.sra.{name}": value for name, value in options.items()}


def guided(scale: float, until: float, **more: Any) -> dict[str, Any]:
    options = {"cfg_scale": scale, "guidance_interval": (0.0, until)} | more
    return {f"sampler.{name}": value for name, value in options.items()}


# (configs/FILE:VARIANT, its source, options)
RECIPES = [
    ("sit:b2", f"{DIVERSEDIT}, Table A1", {"batch_size": 256, "ema_decay": 0.9999, "total_steps": 400_000, "seed": 0}),
    ("diversedit:b2", f"{DIVERSEDIT}, code: per GPU", {"losses.diversity.groups": 256 // 32, "model.skip": "release"}),
    ("dit:", DIT, {"total_steps": 7_000_000, "data.mirror": True, "optim.clip": None, "model.size": "XL"}),
    ("dit:", f"{DIT}, code: sample_ddp.py", {"sampler.steps": 250} | guided(1.5, 1.0, guidance_channels=3)),
    ("repa:b2", f"{DIVERSEDIT}, Table 1", ALIGNED | {"losses.repa.block": 5}),
    ("repa:l2", f"{DIVERSEDIT}, Table 1", ALIGNED | {"losses.repa.block": 8}),
    ("repa:xl2", f"{DIVERSEDIT}, Table 1", ALIGNED | {"losses.repa.block": 8}),
    ("reg:b2", f"{REG}, code", ALIGNED | {"losses.repa.block": 4, "losses.repa.class_token": True}),
    ("reg:xl2", f"{REG}, code", ALIGNED | {"losses.repa.block": 8, "objective.token_weight": 0.03}),
    ("reg:xl2", f"{REG}, code: of 4M steps", {"total_steps": 4_000_000} | guided(2.3, 0.85, token_cfg_scale=2.3)),
    ("sra:b2", f"{SRA}, SiT-B", aligned_later(3, 8)),
    ("sra:l2", f"{SRA}, SiT-L", aligned_later(6, 16)),
    ("sra:xl2", f"{SRA}, SiT-XL", aligned_later(8, 20) | guided(1.8, 0.7)),
    ("sra:xl2,512", f"{SRA}, SiT-XL, 512 pixels", aligned_later(8, 20, pixels=512) | guided(2.5, 0.7)),
    ("disp:b2", f"{DISPERSIVE}, JAX: depth // 4", OFTEN | {"losses.dispersive.blocks": (3,), "optim.b2": 0.95}),
    ("disp:l2", f"{DISPERSIVE}, JAX: depth // 4", OFTEN | {"losses.dispersive.blocks": (6,), "optim.b2": 0.95}),
    ("disp:xl2", f"{DISPERSIVE}, JAX: depth // 4", OFTEN | {"losses.dispersive.blocks": (7,), "optim.b2": 0.95}),
    ("disp:xl2,diversedit", f"{DISPERSIVE}, PyTorch code", LAST | {"losses.dispersive.blocks": (28,)}),
    ("disp:xl2,diversedit", f"{DISPERSIVE}, PyTorch code", {"optim.b2": 0.999}),
    ("mmdit:", f"{REPA}, text to image", {"batch_size": 256, "total_steps": 150_000} | guided(2.0, 1.0, steps=50)),
    ("mmdit:repa", f"{REPA}, text to image", ALIGNED | {"losses.repa.block": 8, "optim.weight_decay": 0.0}),
    ("mean_flow:b2", f"{MEAN_FLOW}, code", {"objective.omega": 1.0, "objective.kappa": 0.5} | ADAM_OF_MEAN_FLOW),
    *(
        (
            f"mean_flow:{size}",
            f"{MEAN_FLOW}, code",
            ADAM_OF_MEAN_FLOW
            | {
                "objective.omega": 0.2,
                "objective.kappa": 0.92,
                "objective.guidance_interval": (0.0, until),
                "total_steps": 1_200_000,
            },
        )
        for size, until in (("l2", 0.8), ("xl2", 0.75))
    ),
]
U_VIT_TRAINS = {
    "optim.learning_rate": 2e-4,
    "optim.weight_decay": 0.03,
    "optim.warmup_steps": 5000,
    "optim.clip": None,
    "ema_decay": 0.9999,
    "sampler.steps": 50,
}
U_VIT_STEPS = {"objective.betas": "scaled_linear", "objective.first_step": 1, "objective.learn_sigma": False}
U_VIT_VP = {"objective.path": "vp", "objective.prediction": "noise", "objective.time_scale": 999.0}


def imagenet(size: str, patch: int, steps: int, drop: float, guidance: float) -> dict[str, Any]:
    """What U-ViT's configs say of one of its networks for ImageNet."""
    betas = {"batch_size": 1024, "optim.b1": 0.99, "optim.b2": 0.99, "data.mirror": True, "codec.scale": 0.18215}
    network = {"model.size": size, "model.patch": patch, "objective.condition_drop": drop}
    return U_VIT_TRAINS | betas | network | {"total_steps": steps, "sampler.cfg_scale": guidance}


RECIPES += [
    ("uvit:h2", f"{U_VIT}, code: imagenet256_uvit_huge.py", U_VIT_STEPS | imagenet("H", 2, 500_000, 0.1, 1.4)),
    ("uvit:l2", f"{U_VIT}, code: imagenet256_uvit_large.py", U_VIT_VP | imagenet("L", 2, 300_000, 0.15, 1.4)),
    ("uvit:h4", f"{U_VIT}, code: imagenet512_uvit_huge.py", U_VIT_STEPS | imagenet("H", 4, 500_000, 0.1, 1.7)),
    ("uvit:l4", f"{U_VIT}, code: imagenet512_uvit_large.py", U_VIT_VP | imagenet("L", 4, 500_000, 0.15, 1.7)),
    ("uvit:h2", f"{U_VIT}, code: dpm_solver_pp.py", {"sampler.solver": "dpm_solver_pp"}),
    (
        "uvit:coco,stored",
        f"{U_VIT}, code: mscoco_uvit_small.py",
        {"batch_size": 256, "total_steps": 1_000_000, "optim.b1": 0.9, "optim.b2": 0.9, "model.size": "S_deep"}
        | {"codec.scale": 0.23010, "data.scale": 0.23010, "objective.condition_drop": 0.1, "sampler.cfg_scale": 2.0}
        | {"model.patch": 2}
        | U_VIT_STEPS
        | U_VIT_TRAINS,
    ),
]


def id_of(value: Any) -> str:
    """The name of a function, else nothing or a word as it is."""
    return value if isinstance(value, str) else f"{value.__module__}.{value.__name__}" if callable(value) else ""


def given(made: Callable | Mapping | tuple) -> Mapping[str, Any]:
    """The defaults of a function, or what a mapping or a named tuple holds."""
    if isinstance(made, tuple):
        return made._asdict()
    if isinstance(made, Mapping):
        return made
    return {name: parameter.default for name, parameter in inspect.signature(made).parameters.items()}


@pytest.mark.parametrize(("made", "source", "wanted"), DEFAULTS, ids=id_of)
def test_defaults_are_the_published_ones(made, source, wanted):
    found = given(made)
    assert {option: found[option] for option in wanted} == wanted, source


@pytest.mark.parametrize(("name", "source", "wanted"), RECIPES, ids=id_of)
def test_recipes_are_the_published_ones(name, source, wanted):
    file, _, variant = name.partition(":")
    found = flat(importlib.import_module(f"diversedit_jax.configs.{file}").get_config(variant).to_dict())
    found = {option: tuple(value) if isinstance(value, list) else value for option, value in found.items()}
    assert {option: found[option] for option in wanted} == wanted, source

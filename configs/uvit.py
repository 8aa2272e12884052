"""U-ViT on ImageNet latents and on MS-COCO, alone and with each method (arXiv 2209.12152, github.com/baofff/U-ViT).

    python -m diversedit_jax.train --config=configs/uvit.py:h2,diversedit_const --workdir=DIR \\
        --config.data.data_dir=LATENTS
    python -m diversedit_jax.train --config=configs/uvit.py:coco,stored --workdir=DIR --config.data.data_dir=FEATURES \\
        --config.data.kind=logvar --config.text_encoder.file=hf:openai/clip-vit-large-patch14

Variant: a network, `h2`, `l2` (256 pixels), `h4`, `l4` (512) or `coco`; and methods, `repa`, `sra`, `disp`,
`diversedit` or `diversedit_const`; h2 alone by default. `coco` is U-ViT-S/2 (deep) on latents with token ids, see
configs/mmdit.py; --config.model.size=S is the other one, with FID 5.95. With `stored` it reads the folders of U-ViT's
scripts, which hold text features; the text encoder is then for prompts alone.
Hardware: a TPU v5e-16 or larger slice, or 8 GPUs; its authors used 8, and 4 for `coco`. The state of h2 takes 8 GB: set
--config.mesh.data=1 --config.mesh.fsdp=-1. Plans for h2, compiled and not run (tools/benchmark/records/pod_plan.md): a
v5e-16 with --config.model.remat=full, 12.6 of 15.75 GiB a chip, 620 to 1,598 images/s, 3.7 to 9.6 days; a v5p-32, 22.8
of 95.7 GiB, 1,471 to 4,463 images/s, 1.3 to 4.0 days.
Expected: FID after the authors' steps (their README). Methods have no published score on U-ViT.

    | variant |  FID | steps, batch | guidance | trained on                | sampled with      |
    |---------|------|--------------|----------|---------------------------|-------------------|
    | h2      | 2.29 | 500K, 1024   |      1.4 | 1000 steps                | DPM-Solver++, 50  |
    | h4      | 4.05 | 500K, 1024   |      1.7 | 1000 steps                | DPM-Solver++, 50  |
    | l2      | 3.40 | 300K, 1024   |      1.4 | continuous times, VP path | DPM-Solver, 50    |
    | l4      | 4.67 | 500K, 1024   |      1.7 | continuous times, VP path | DPM-Solver, 50    |
    | coco    | 5.48 | 1M, 256      |        2 | 1000 steps                | DPM-Solver++, 50  |

The authors sample l2 and l4 with the plain DPM-Solver, which extrapolates the noise; here they have DPM-Solver++, too,
which extrapolates the data. Their guidance s is 1 + s here. The scores are of pytorch-fid with statistics of their own.
They train in float16, do not clip gradients (so does this recipe), and keep the best of several checkpoints.
h2 and h4 were trained on latents of `autoencoder_kl_ema.pth`, the others on those of `autoencoder_kl.pth`.

`coco` multiplies latents by 0.23010 instead of 0.18215. An autoencoder whose config.json says 0.18215, and latents that
were made with it, are refused at 0.23010: encode and decode with a bare file such as the authors', or set
--config.codec.scale=0.18215.

U-ViT has long skip connections of its own, so `diversedit` adds the diversity loss alone; --config.model.skip=paper
puts DiverseDiT's LayerNorm into them. With them blocks differ from the start, and the adaptive weight switches most of
the loss off: at initialisation it is 0.3 to 0.5, and 1 on SiT. Watch `diversity/weight`, and compare `diversedit`
(weight by the released thresholds) with `diversedit_const` (constant weight 0.001).
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default, repa
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import uvit
from diversedit_jax.registry import one_of


class Network(NamedTuple):
    """What the authors' configs say of one network. side: of its latents. continuous: the times that it learns."""

    size: str
    patch: int
    side: int
    steps: int
    continuous: bool
    drop: float
    cfg_scale: float


NETWORKS = {
    "h2": Network("H", 2, 32, 500_000, continuous=False, drop=0.1, cfg_scale=1.4),
    "l2": Network("L", 2, 32, 300_000, continuous=True, drop=0.15, cfg_scale=1.4),
    "h4": Network("H", 4, 64, 500_000, continuous=False, drop=0.1, cfg_scale=1.7),
    "l4": Network("L", 4, 64, 500_000, continuous=True, drop=0.15, cfg_scale=1.7),
    "coco": Network("S_deep", 2, 32, 1_000_000, continuous=False, drop=0.1, cfg_scale=2.0),
}
PRESETS = {"diversedit": "release", "diversedit_const": "release_const"}
METHODS = ("repa", "sra", "disp", *PRESETS)


def get_config(variant: str = "") -> ConfigDict:
    """The authors' recipe for a network, with the methods of the variant."""
    words = [one_of("variant", word, (*NETWORKS, "stored", *METHODS)) for word in variant.split(",") if word]

    def only(kind: dict, usual: str | None) -> str | None:
        found = [word for word in words if word in kind] or [usual]
        if len(found) > 1:
            raise ConfigError(f"variant {variant!r}: give one of {', '.join(found)}")
        return found[0]

    name = only(NETWORKS, "h2")
    given, coco = NETWORKS[name], name == "coco"
    if "stored" in words and not coco:
        raise ConfigError(f"variant {variant!r}: only coco has stored text features")
    config = default.get_config()
    config.update({"total_steps": given.steps, "batch_size": 256 if coco else 1024})
    if coco:
        scale = config.codec.scale = 0.23010
        config.data = slot("data", "uvit", scale=scale) if "stored" in words else slot("data", "latents")
        config.text_encoder = slot("encoders", "clip_text")
    else:
        config.data.update({"shape": (given.side, given.side, 4), "mirror": True})
    config.model = slot("models", "uvit", size=given.size, patch=given.patch, dtype="bfloat16")
    if given.continuous:
        learns = {"path": "vp", "prediction": "noise", "time_scale": 999.0}
        config.objective = slot("objectives", "flow_matching", condition_drop=given.drop, **learns)
    else:
        learns = {"betas": "scaled_linear", "first_step": 1, "learn_sigma": False}
        config.objective = slot("objectives", "ddpm", condition_drop=given.drop, **learns)
    config.optim.update({"learning_rate": 2e-4, "weight_decay": 0.03, "warmup_steps": 5_000, "clip": None})
    config.optim.update({"b1": 0.9, "b2": 0.9} if coco else {"b1": 0.99, "b2": 0.99})
    config.sampler.update({"solver": "dpm_solver_pp", "steps": 50, "cfg_scale": given.cfg_scale})
    return added(config, words, only(PRESETS, None), given)


def added(config: ConfigDict, words: list[str], diversity: str | None, given: Network) -> ConfigDict:
    """Add methods to the recipe. Nobody has published them on U-ViT.

    REPA aligns block 8, as in the SiT of L and XL. SRA aligns a quarter of the depth to two thirds of it, as in the SiT
    of B and L, and keeps its weight. Dispersive Loss takes a quarter of the depth, as its authors' JAX code does.
    """
    depth = uvit.SIZES[given.size].depth + 1
    if diversity is not None:  # the published runs took its statistics per GPU, of 32 examples
        groups = config.batch_size // 32
        config.losses.diversity = slot("losses", "diversity", preset=PRESETS[diversity], groups=groups)
    if "sra" in words:
        blocks = {"block": depth // 4, "teacher_block": 2 * depth // 3}
        steps = None if given.continuous else 1000
        config.losses.sra = slot("losses", "sra", **blocks, num_timesteps=steps, decay_epochs=None, dtype="bfloat16")
    if "disp" in words:
        groups = config.batch_size // 16
        config.losses.dispersive = slot("losses", "dispersive", blocks=(depth // 4,), groups=groups)
    if "repa" in words:
        repa.align(config, ("dinov2", 8))
        if given.patch == 4:  # 512 pixels with the tokens of 256
            config.encoders.dinov2.side = 224
    return config

"""Text to image on MS-COCO with MMDiT, alone and with each method (arXiv 2403.03206; recipe of REPA, arXiv 2410.06940).

    python -m diversedit_jax.train --config=configs/mmdit.py:coco,repa --workdir=DIR --config.data.data_dir=LATENTS \\
        --config.text_encoder.file=hf:openai/clip-vit-large-patch14 --config.encoders.dinov2.file=DINOV2
    python -m diversedit_jax.sample --workdir=DIR --prompts="a red bus in the rain" --cfg_scale=2
    python -m diversedit_jax.evaluate --workdir=DIR --preset=coco30k --data=latents=LATENTS_OF_VAL2014 --vae=VAE \\
        --reference=coco.npz --extractor=inception=FILE --extractor=clip=hf:openai/clip-vit-large-patch14

Variant: `coco` (latents of 256 pixels with token ids, from tools.prepare_latents --tokenizer) or `uvit` (the folders of
U-ViT's scripts, with text features; say what they hold: --config.data.kind=logvar or std), and `repa`, `sra`, `disp` or
`diversedit`, also several; coco by default. `repa` reads images: prepare them with --image=png.
Hardware: a TPU v5e-16 or larger slice, or 8 GPUs. Its plan for v5e-16 with REPA (compiled, not run): 12.0 of 15.75 GiB
a chip, 1,192 to 3,233 images/s, 0.1 to 0.4 days (tools/benchmark/records/pod_plan.md).
Expected: FID after 150K steps of 256 images with guidance 2 at all times. Papers say, by Euler with 50 steps (`ODE`)
and by SDE with 250:

    | variant         | ODE          | SDE          | from                              |
    |-----------------|--------------|--------------|-----------------------------------|
    | coco            | 5.86 to 6.05 | 5.26 to 5.30 | REPA, HASTE, SRA                  |
    | coco,repa       | 4.60 to 4.73 | 4.14 to 4.16 | REPA, HASTE, SRA                  |
    | coco,sra        | 4.74 to 4.85 |              | SRA; its blocks are not published |
    | coco,diversedit |              |              | nobody has published it           |

HASTE's guidance is 2.25. The same row differs between papers by as much as methods differ within one: compare with a
baseline of your own. REPA's code has torch's initialisation (--config.model.init=torch), here blocks begin as the
identity. Its recipe has float16 and up to 400K steps in the script, 150K in the paper. Images are not mirrored, because
captions name left and right. With `uvit` the text encoder is for prompts alone: training reads the stored features.
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default, diversedit, repa
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of

DATA = ("coco", "uvit")
METHODS = ("repa", "sra", "disp", "diversedit")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of REPA's text-to-image experiment, with the methods of the variant."""
    words = [one_of("variant", word, DATA + METHODS) for word in variant.split(",") if word]
    if len(data := [word for word in words if word in DATA] or [DATA[0]]) > 1:
        raise ConfigError(f"variant {variant!r}: give one of {', '.join(data)}")
    config = default.get_config()
    config.total_steps = 150_000
    config.data = slot("data", "latents" if data == ["coco"] else "uvit")
    config.text_encoder = slot("encoders", "clip_text")
    config.model = slot("models", "mmdit", dtype="bfloat16")
    config.sampler.update({"solver": "euler", "steps": 50, "cfg_scale": 2.0})
    if "diversedit" in words:
        diversedit.diversify(config)
    if "sra" in words:  # the blocks of SiT-L, which has as many; the weight stays
        config.losses.sra = slot("losses", "sra", block=6, teacher_block=16, decay_epochs=None, dtype="bfloat16")
    if "disp" in words:
        config.losses.dispersive = slot("losses", "dispersive", blocks=(6,), groups=config.batch_size // 16)
    if "repa" in words:
        repa.align(config, ("dinov2", 8))
    return config

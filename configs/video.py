"""Videos by class: a SiT whose blocks attend within a frame and across frames in turn, as in Latte (arXiv 2401.03048).

    python -m tools.prepare_latents VIDEOS LATENTS --vae=sd-vae-ft-ema --frames=16 --interval=3
    python -m diversedit_jax.train --config=configs/video.py:xl2,diversedit --workdir=DIR --config.data.data_dir=LATENTS

Variant: a size (b2, l2, xl2), a resolution (256, 512), `joint` (all tokens of all frames attend to each other), and
methods, `diversedit`, `repa` and `sra`; b2 and 256 by default. Clips have 16 frames; for others set
--config.data.shape. For `repa` prepare the latents with --image=jpeg, and give --config.encoders.dinov2.file.
Hardware: a TPU v5e-16 or larger slice, or 8 GPUs. The plan of `xl2,diversedit` for a v5e-16, compiled and not run
(tools/benchmark/records/pod_plan.md): with --config.mesh.data=1 --config.mesh.fsdp=-1 --config.model.remat=full it
takes 8.7 of 15.75 GiB a chip, 40 to 99 clips/s, 7.5 to 18.7 days. Its blocks stand in a loop
(--config.model.unroll=False).
Expected: nothing is published for DiverseDiT on videos, and nobody has trained this recipe. The network is Latte's but
for two things: the positions of frames are added to the embedding, and not behind the first block, and relative to the
first frame. The objective is SiT's; Latte has DDPM, and clips gradients at 0.1 from step 20,000 on.

With `diversedit` the long residuals join blocks of the same kind, and the loss compares blocks of the same kind
(`pairing`, `kinds`): blocks that attend along different axes are different anyway.
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, repa, sit, sra, variants

FRAMES = 16


def get_config(variant: str = "") -> ConfigDict:
    """SiT's recipe on clips of 16 frames, with methods. REPA and SRA align the same blocks as on images."""
    size, resolution, added = variants.read(variant, "joint", "diversedit", "repa", "sra")
    config = sit.get_config(f"{size},{resolution}")
    config.total_steps = 1_000_000
    config.batch_size = 64
    config.data.shape = (FRAMES, *config.data.shape)
    if "joint" not in added:
        config.model.attention_axes = "factorised"
    if "diversedit" in added:
        diversedit.diversify(config)
        config.losses.diversity.groups = 1
        if "joint" not in added:
            config.model.pairing = "same_kind"
            config.losses.diversity.kinds = 2
    if "sra" in added:
        block, teacher = sra.BLOCKS[size]
        options = {"block": block, "teacher_block": teacher, "decay_epochs": None}
        config.losses.sra = slot("losses", "sra", **options, dtype="bfloat16")
    if "repa" in added:
        repa.align(config, ("dinov2", repa.BLOCKS[size]))
    config.sampler.batch_size = 16
    config.samples.num = 16
    return config

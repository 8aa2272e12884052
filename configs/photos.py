"""DiverseDiT on latents of photographs: the whole chain from images on disk to samples, on any CPU, without a download.

    python -m tools.studies.photographs runs/photos                    # or images of your own, a folder for each class
    python -m tools.studies.photo_vae runs/photos runs/photo_vae       # or an autoencoder of Stable Diffusion's kind
    python -m tools.prepare_latents runs/photos runs/latents --vae=runs/photo_vae --size=32
    python -m diversedit_jax.train --config=configs/photos.py --workdir=runs/photo_model

Hardware: any; 2 CPU cores take 7 min for the autoencoder and 6 min for the training. Expected: crops that one can tell
apart by class, 16 of them in two rows of samples.png, as blurred as the small autoencoder makes them (21 dB).
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default


def get_config() -> ConfigDict:
    """A DiverseDiT 128 wide and 6 deep, on latents of any size and number of classes."""
    config = default.get_config()
    config.total_steps = 2_000
    config.batch_size = 64
    config.data = slot("data", "latents", data_dir="runs/latents", mirror=True)
    config.codec = slot("codecs", "vae", vae="runs/photo_vae")
    config.model = slot("models", "dit", depth=6, width=128, heads=4, patch=2, skip="release")
    config.objective.time = "logit_normal"
    config.losses.diversity = slot("losses", "diversity", preset="release")
    config.optim.update({"learning_rate": 1e-3, "decay": "cosine", "warmup_steps": 50})
    config.ema_decay = 0.99
    config.log_every = 50
    config.checkpoint.update({"every": 500, "keep_every": 0})
    config.sampler.update({"solver": "heun", "steps": 25, "cfg_scale": 1.5, "batch_size": 64})
    config.samples.update({"every": 500, "num": 64})
    return config

"""DiverseDiT on videos: a handwritten digit that moves and bounces, by digit and direction, on any CPU.

python -m diversedit_jax.train --config=configs/moving_digits.py --workdir=runs/moving_digits
python -m diversedit_jax.sample --workdir=runs/moving_digits --labels=14 --num=9

Hardware: any; 2 CPU cores.
Expected
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default


def get_config() -> ConfigDict:
    """A DiverseDiT on 8 frames of 16 x 16 pixels."""
    config = default.get_config()
    config.total_steps = 3_000
    config.batch_size = 32
    config.data = slot("data", "moving_digits")
    config.codec = slot("codecs", "pixels")
    config.model.update({"depth": 4, "width": 64, "heads": 4, "patch": 4, "skip": "release"})
    config.objective.update({"time": "logit_normal", "time_mean": 0.5, "time_std": 1.2})
    config.losses.diversity = slot("losses", "diversity", preset="release")
    config.optim.update({"learning_rate": 4e-3, "decay": "cosine", "warmup_steps": 50})
    config.ema_decay = 0.995
    config.log_every = 100
    config.checkpoint.update({"every": 500, "keep_every": 0})
    config.sampler.update({"solver": "heun", "steps": 15, "cfg_scale": 2.0, "batch_size": 128})
    config.samples.update({"every": 1_000, "num": 40})
    config.evaluators.moving_digits = slot("evaluators", "moving_digits", num=400)
    config.evaluators.moving_digits.every = 1_000
    config.evaluators.scores = slot("evaluators", "scores", extractor="moving_digits", num=400)  # at the end
    return config

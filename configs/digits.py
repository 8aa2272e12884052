"""DiverseDiT on the 1,797 handwritten digits that scikit-learn bundles: the default example, on any CPU.

python -m diversedit_jax.train --config=configs/digits.py --workdir=runs/digits

Hardware: any; 2 CPU cores take a few minutes. Expected after 1,500 steps: an independent classifier recognises at least
97% of the samples (99% of held-out digits), and their Frechet distance to the held-out digits, in pixel space, is below
1.5 (that of the training digits: 0.41).
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default


def get_config() -> ConfigDict:
    """A DiverseDiT 64 wide and 4 deep, on 8 x 8 pixels in 2 x 2 patches."""
    config = default.get_config()
    config.total_steps = 1_500
    config.batch_size = 128
    config.data = slot("data", "digits")
    config.codec = slot("codecs", "pixels")
    config.model.update({"depth": 4, "width": 64, "heads": 4, "skip": "release"})
    config.objective.time = "logit_normal"
    config.losses.diversity = slot("losses", "diversity", preset="release")
    config.optim.update({"learning_rate": 2e-3, "decay": "cosine", "warmup_steps": 50})
    config.ema_decay = 0.995
    config.log_every = 100
    config.checkpoint.update({"every": 500, "keep_every": 0})
    config.sampler.update({"solver": "heun", "steps": 25, "cfg_scale": 1.5, "batch_size": 100})
    config.samples.update({"every": 500, "num": 100})
    config.evaluators.digits = slot("evaluators", "digits", num=1000)
    config.evaluators.digits.every = 500
    config.evaluators.scores = slot("evaluators", "scores", extractor="digits", num=1000)  # at the end; see evaluate.py
    return config

"""The config of the project.

python -m diversedit_jax.train --config=tests/outside/config.py --workdir=DIR
python -m diversedit_jax.sample --workdir=DIR --trust_workdir    # its parts are code outside of the package
"""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import default
from diversedit_jax.training import optimizer
from tests.outside import DEVIATION


def get_config() -> ConfigDict:
    """The project's own parts in every slot, and a group of parameters with an optimizer of its own."""
    config = default.get_config()
    config.update({"total_steps": 400, "batch_size": 128, "log_every": 20, "ema_decay": 0.98})
    config.data = slot("data", "tests.outside.data:make")
    config.codec = slot("codecs", "tests.outside.codec:make")
    config.model = slot("models", "tests.outside.network:make", deviation=DEVIATION)
    config.objective = slot("objectives", "tests.outside.objective:make")
    config.losses.probe = slot("losses", "tests.outside.loss:make")
    config.optim.update({"learning_rate": 2e-2, "decay": "cosine"})
    config.groups.uncertainty = optimizer.group("^objective/", learning_rate=1e-2, clip=0.1)
    config.checkpoint.update({"every": 100, "keep_every": 0})
    config.sampler.update({"solver": "heun", "steps": 20, "batch_size": 64})
    config.samples.update({"every": 0, "num": 16})
    config.evaluators.scores = slot("evaluators", "scores", extractor="tests.outside.extractor:make", num=128)
    return config

"""The small run that chaos disturbs. It saves every few steps."""

from ml_collections import ConfigDict

from diversedit_jax.config import slot
from diversedit_jax.configs import digits

STEPS, EVERY = 120, 4  # steps of the run; steps between saves


def get_config() -> ConfigDict:
    """A DiverseDiT 16 wide on the digits."""
    config = digits.get_config()
    config.update({"total_steps": STEPS, "batch_size": 16, "log_every": 1})
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.optim.decay = "constant"  # so that total_steps may change
    config.checkpoint.update({"every": EVERY, "keep": 3})
    config.samples.update({"every": 0, "num": 10})
    config.sampler.update({"solver": "euler", "steps": 1, "batch_size": 16})
    config.evaluators = ConfigDict({"digits": slot("evaluators", "digits", num=20)})  # at the end
    return config

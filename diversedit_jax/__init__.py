"""Diffusion transformers with diverse internal representations, in JAX (DiverseDiT, arXiv 2603.04239).

    import diversedit_jax
    from diversedit_jax.configs import digits

    model = diversedit_jax.train(digits.get_config(), "runs/digits")     # trains, or goes on, and opens the run
    model = diversedit_jax.load("runs/digits")                           # opens a run
    model = diversedit_jax.load("SiT-XL-2-256.pt", family="official_sit", vae="sd-vae-ft-ema")  # opens a release

    images = model.sample(labels=[3, 5], num=16, cfg_scale=1.5, seed=0)  # uint8 [16 h w c]; a grid in a notebook
    blocks = model.features(images, t=0.5, y=images.labels)              # [blocks 16 tokens width]
    scores = model.evaluate(num=1000)                                    # {"fd_digits": ..., ...}
    report = model.analyze()                                             # figures in a notebook, and report.html
    model.params, model.config, model.step

The losses for other models are in `diversedit_jax.losses`, and need jax alone. `python -m diversedit_jax` lists the
programs.
"""

from importlib import import_module as _import
from typing import Any as _Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> _Any:
    """Import what needs all of the package when it is asked for: the losses need jax alone."""
    if name == "load":
        return _import("diversedit_jax.network").load
    if name == "train":
        return _import("diversedit_jax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

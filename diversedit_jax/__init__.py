"""Diffusion transformers with diverse internal representations, in JAX (DiverseDiT, arXiv 2603.04239)."""

__version__ = "0.1.0"

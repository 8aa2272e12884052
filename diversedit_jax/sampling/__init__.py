"""Sampling: from a trained network to samples."""

"""Evaluation: samples against real images, scores, tables."""

"""Measures of samples and features: arrays in, numbers out."""

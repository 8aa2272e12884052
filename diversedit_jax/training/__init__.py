"""Training: the step, the optimizer, checkpoints."""

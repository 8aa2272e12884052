"""Diffusion itself: paths between data and noise, times, guidance, solvers. Functions of arrays."""

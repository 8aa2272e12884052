"""Small runs broken on purpose: `python -m tools.chaos --help`."""

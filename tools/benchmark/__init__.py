"""Benchmarks and their records: `python -m tools.benchmark --help`."""

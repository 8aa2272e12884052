"""Runs: from a config to what trains it, and from a finished run or a release to what samples it."""

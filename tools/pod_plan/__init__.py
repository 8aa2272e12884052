"""What a run takes on a TPU slice, planned without a TPU: `python -m tools.pod_plan --help`."""

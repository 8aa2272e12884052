"""File formats of weights, each read as data: nothing that a file holds is run."""

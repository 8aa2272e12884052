"""Looking into networks: how alike their blocks are, what each holds, what trains it. And the page of a run."""

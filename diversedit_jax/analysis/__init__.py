"""Looking into networks: how alike their blocks are, what each holds, what trains it, and figures that show it."""

"""The nodes of a run: placement on Ray, one agent per node, and checks before the start."""

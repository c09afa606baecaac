"""The nodes: one agent a node on Ray, placement, and the supervisor."""

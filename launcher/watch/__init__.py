"""Reads a run directory, of a live or an ended run."""

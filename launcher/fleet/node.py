"""A node of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """A node with its agent. Node rank 0 is the first of the list that `Nodes.place` returns."""

    agent: Any
    host: str
    address: str
    gpus: tuple[str, ...]
    interface: str | None = None
    clock_offset_seconds: float = 0.0

"""A node of a run, and which nodes take the places of lost ones."""

from __future__ import annotations

from collections.abc import Sequence
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


def fill_places(nodes: Sequence[Node], spares: Sequence[Node], usable: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """(nodes, spare nodes) without those that are not usable: spare nodes take the places of lost nodes.

    The other nodes keep their order; without enough spare nodes there are fewer nodes.
    """
    left = [node for node in spares if node in usable]
    filled = [node if node in usable else left.pop(0) if left else None for node in nodes]
    return [node for node in filled if node is not None], left

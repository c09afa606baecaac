"""Notices spare nodes that are lost while the ranks run on other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.errors import first_line
from launcher.fleet.node import Node

_POLL_SECONDS = 10.0
_NO_ATTEMPT = 0
"""The agent of a spare node has no reports of such an attempt, so the call only waits."""


class SpareWatch:
    """Calls the agent of every spare node all the time. Ray ends the call of a lost node."""

    def __init__(self) -> None:
        self._calls: dict[Any, Node] = {}

    def lost(self, spares: Sequence[Node]) -> list[tuple[Node, str]]:
        """The spare nodes that were lost since the last call, with why. Returns at once."""
        import ray

        for node in spares:
            if node not in self._calls.values():
                self._calls[node.agent.next_reports.remote(_POLL_SECONDS, _NO_ATTEMPT)] = node
        ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0) if self._calls else ([], [])
        found = []
        for call in ready:
            node = self._calls.pop(call)
            try:
                ray.get(call)
            except ray.exceptions.RayError as error:
                if node in spares:
                    found.append((node, first_line(error)))
        return found

"""Notices of Ray that nodes will end soon: before a preemption, or by `ray drain-node`. Ray places nothing there."""

from __future__ import annotations

import threading
import time

_POLL_SECONDS = 2.0
_END_SECONDS = 5.0


def draining_nodes() -> dict[str, float]:
    """Ray's ids of the nodes that are being drained, and when they end (seconds since the epoch; 0: unknown).

    Empty if this Ray does not report it. Raises errors of Ray if its head does not answer.
    """
    try:
        # Ray has no public API for this; its own training library uses the same function.
        from ray._private.state import state

        drained = state.get_draining_nodes()
    except (ImportError, AttributeError):
        return {}
    return {node: milliseconds / 1000 for node, milliseconds in drained.items()}


class DrainWatch:
    """Asks Ray every few seconds, in a thread, since an answer may take long."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="drain watch", daemon=True)
        self._thread.start()

    def deadline_of(self, address: str) -> float | None:
        """When the node at this address ends (seconds since the epoch; 0: unknown); None if it is not drained."""
        return self._found.get(address)

    def end(self) -> None:
        self._ended.set()
        self._thread.join(_END_SECONDS)

    def _poll(self) -> None:
        import ray

        while not self._ended.wait(_POLL_SECONDS):
            try:
                drained = draining_nodes()
                nodes = ray.nodes() if drained else []
            except Exception:
                # Whether Ray is lost is noticed elsewhere.
                continue
            addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
            self._found = {addresses[node]: end for node, end in drained.items() if node in addresses}


def time_left(deadline: float) -> str:
    """The time until a deadline in words; empty if it is unknown."""
    return f", and ends it in {max(0.0, deadline - time.time()):.0f} s" if deadline else ""

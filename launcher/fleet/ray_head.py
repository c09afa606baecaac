"""Checks that Ray's head process runs; a run cannot continue without it.

Ray itself does not report its loss: calls wait, the agents end, and after a minute Ray ends this process.
"""

from __future__ import annotations

import socket
import time

OWN_SECONDS = 10.0
"""A head that this process started is not restarted."""
JOINED_SECONDS = 40.0
"""The head of a joined Ray may be restarted; Ray itself waits for 60 seconds."""
_CHECK_SECONDS, _CONNECT_SECONDS = 2.0, 2.0
_MIN_FAILED = 3
"""One failed attempt after a long pause is not enough."""


class RayHead:
    """The head process (GCS) at `address`, host:port. It is lost if nothing listens there for `patience_seconds`."""

    def __init__(self, address: str, patience_seconds: float) -> None:
        self.address, self._patience = address, patience_seconds
        self._checked = self._answered = time.monotonic()
        self._failed = 0

    def gone(self) -> bool:
        """Whether the head is lost. Connects at most every two seconds."""
        now = time.monotonic()
        if now - self._checked >= _CHECK_SECONDS:
            self._checked = now
            if self._answers():
                self._answered, self._failed = now, 0
            else:
                self._failed += 1
        return self._failed >= _MIN_FAILED and now - self._answered >= self._patience

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError:
            return False
        return True


def head_of_this_ray(*, own: bool) -> RayHead:
    """The head of the Ray that this process has joined."""
    import ray

    return RayHead(ray.get_runtime_context().gcs_address, OWN_SECONDS if own else JOINED_SECONDS)

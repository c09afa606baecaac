"""Whether Ray's head process still runs, without which a run cannot go on.

Ray itself does not report this: calls wait, the agents end by themselves, and after a minute Ray ends this process.
"""

from __future__ import annotations

import socket
import time

OWN_SECONDS = 10.0
"""A head of the run's own does not come back."""
JOINED_SECONDS = 40.0
"""The head of a Ray that was joined may be started again; Ray itself waits for 60 seconds."""
_LOOK_SECONDS, _CONNECT_SECONDS = 2.0, 2.0
_LEAST_MISSED = 3
"""One look that fails after a long wait is not enough."""


class RayHead:
    """The head process (GCS) at `address`, host:port. It is gone once nothing has listened there for so long."""

    def __init__(self, address: str, patience_seconds: float) -> None:
        self.address, self._patience = address, patience_seconds
        self._looked = self._answered = time.monotonic()
        self._missed = 0

    def gone(self) -> bool:
        """Whether it is gone. Looks every two seconds at most."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            if self._answers():
                self._answered, self._missed = now, 0
            else:
                self._missed += 1
        return self._missed >= _LEAST_MISSED and now - self._answered >= self._patience

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

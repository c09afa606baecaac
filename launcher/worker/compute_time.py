"""The time a rank spends in its forward passes, in which no gradients are exchanged.

Every rank waits for the slowest one in an update, so step times are equal; this time identifies the slowest rank.
Under ZeRO-3 the forward pass also gathers weights, which hides some of the difference.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class ComputeTime:
    """Sums the time spent inside `with` blocks. On a GPU it is GPU time, measured without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((_event(), _event()))
        else:
            self._started = time.perf_counter()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Returns the seconds since the last call. The GPU must have finished the last block."""
        seconds: float = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return round(seconds, 6)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event

"""How long a rank itself computes: its forward passes, in which no gradient is exchanged.

All ranks take equally long over an update, since each waits for the slowest; by this time the slowest can be told.
Under ZeRO-3 weights are gathered in the forward pass too, which hides some of the difference.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class OwnTime:
    """Sums what is done inside `with` blocks. On a GPU it is the GPU's time, measured without making it wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((_event(), _event()))
        else:
            self._began = time.perf_counter()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since this was last asked. The GPU must have come to the end of the last block."""
        seconds: float = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return round(seconds, 6)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event

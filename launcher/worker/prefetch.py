"""Micro-batches that are ready before training needs them: a thread of the rank makes them.

The thread starts with training, so a process that forks has none. It changes no random state of numpy or torch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from launcher.worker.batches import MicroBatch

AHEAD = 4
"""How many micro-batches are ready at most."""
THREAD_NAME = "prefetch"


class Prefetch:
    """The micro-batches of an iterator, in its order, on the rank's device. They can be iterated over once.

    The thread runs between entering and leaving a `with` block. It calls `make_batches` and makes the micro-batches, on
    the CPU, in pinned memory if the device is a GPU. The iteration raises the exceptions of the thread.
    """

    def __init__(self, make_batches: Callable[[], Iterator[MicroBatch]], device: torch.device) -> None:
        self._make_batches, self._device = make_batches, device
        self._ready: queue.SimpleQueue[MicroBatch | BaseException | None] = queue.SimpleQueue()
        """None follows the last micro-batch."""
        self._room = threading.Semaphore(AHEAD - 1)
        self._closed = False
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._room.release()
        self._thread.join()

    def __iter__(self) -> Iterator[MicroBatch]:
        while (batch := self._wait_for_batch()) is not None:
            yield batch

    def take_seconds(self) -> float:
        """Returns the seconds, since the last call, of waiting for micro-batches and starting their copies to a GPU."""
        seconds, self._seconds = self._seconds, 0.0
        return round(seconds, 6)

    def _wait_for_batch(self) -> MicroBatch | None:
        began = time.perf_counter()
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        if batch is not None:
            # Here, not in the thread: the copy is on the stream of the kernels that need it. PyTorch does not reuse
            # pinned memory before copies from it are done.
            batch = batch.on(self._device)
        self._seconds += time.perf_counter() - began
        # Last: the thread that this wakes competes for the interpreter.
        self._room.release()
        return batch

    def _work(self) -> None:
        try:
            pinned = self._device.type == "cuda"
            if pinned:
                # A thread starts on GPU 0, and pinning memory would create a context there.
                torch.cuda.set_device(self._device)
            for batch in self._make_batches():
                self._ready.put(batch.pinned() if pinned else batch)
                self._room.acquire()
                if self._closed:
                    return
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

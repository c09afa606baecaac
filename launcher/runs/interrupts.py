"""Handling signals and requests to stop during a run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from launcher.errors import LauncherError
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole

if TYPE_CHECKING:
    from launcher.runs.supervisor import Supervisor

_POLL_SECONDS = 1.0


class Interrupted(LauncherError):
    """A signal stopped the run at once. The exit status is 128 plus the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Interrupts:
    """Handles SIGINT and SIGTERM.

    The first signal stops the run after the current update and saves. A second one, or one before training, stops it
    at once.
    """

    def __init__(self, console: RunConsole) -> None:
        self._console = console
        self.supervisor: Supervisor | None = None
        self.signal = 0
        self.reason = "interrupted"
        self._at_once = False

    def cancel(self, request: dict[str, Any]) -> None:
        """Handles a request of `launcher cancel` like a SIGTERM; called in another thread."""
        self.reason = f"cancelled by {request['by']}"
        self._at_once = request["now"]
        self._console.note(f"          {escape(self.reason)}{', at once' if request['now'] else ''}")
        os.kill(os.getpid(), signal.SIGTERM)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        supervisor = self.supervisor
        if self._at_once or supervisor is None or supervisor.stopping or not supervisor.request_stop(number):
            raise KeyboardInterrupt
        action = "the run is about to end" if supervisor.phase == "exporting" else supervisor.stop_action
        self._console.note(f"{signal.Signals(number).name}: {action} (a second signal stops it now)")


@contextmanager
def interruptible(console: RunConsole, directory: RunDir) -> Iterator[Interrupts]:
    """Handles signals and requests to stop inside the block. Raises Interrupted if the run is stopped at once."""
    interrupts = Interrupts(console)
    done = threading.Event()
    threading.Thread(target=_poll_requests, args=(directory, interrupts, done), daemon=True).start()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous: dict[int, Any] = {number: signal.signal(number, interrupts.handle) for number in numbers}
    try:
        yield interrupts
    except KeyboardInterrupt:
        raise Interrupted(interrupts.signal or signal.SIGINT) from None
    finally:
        done.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _poll_requests(directory: RunDir, interrupts: Interrupts, done: threading.Event) -> None:
    """Passes on requests of `launcher cancel` until `done` is set. A second request may ask to stop at once."""
    last: dict[str, Any] | None = None
    while not done.wait(_POLL_SECONDS):
        request = directory.stop_request()
        if request and request != last:
            last = request
            with suppress(OSError):
                directory.event({"event": "stop_requested", "now": request["now"], "by": request["by"]})
            interrupts.cancel(request)

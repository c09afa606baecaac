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

from launcher.errors import LauncherError, Problem, RequestError
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole

if TYPE_CHECKING:
    from launcher.runs.supervisor import Supervisor

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Slurm's --signal sends them before the time limit. A second one does not stop the run at once."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)
_POLL_SECONDS = 1.0


class Interrupted(LauncherError):
    """A signal stopped the run at once. The exit status is 128 plus the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


def request_reason(request: dict[str, Any]) -> str:
    """The `reason` in state.json of a run that was stopped on a request."""
    return "the time limit of its Slurm job is near" if request.get("time_limit") else f"cancelled by {request['by']}"


def stop_reason(number: int) -> str:
    """The `reason` in state.json of a run that a signal stopped."""
    return f"received {signal.Signals(number).name}"


class Interrupts:
    """Handles SIGINT, SIGTERM, SIGUSR1 and SIGUSR2.

    The first signal stops the run after the current update and saves. A second SIGINT or SIGTERM, or any signal before
    training, stops it at once.
    """

    def __init__(self, console: RunConsole) -> None:
        self._console = console
        self.supervisor: Supervisor | None = None
        self.signal = 0
        self.asked = False
        """Whether a SIGINT or SIGTERM came, also from `launcher cancel`; a warning of the time limit is neither."""
        self._request: str | None = None
        self._at_once = self._ending = False

    @property
    def reason(self) -> str | None:
        """Who or what stopped the run; None if nothing did."""
        if self._request or not self.signal:
            return self._request
        return stop_reason((self.supervisor and self.supervisor.stop_signal) or self.signal)

    def cancel(self, request: dict[str, Any]) -> None:
        """Handles a request like a SIGTERM, or like Slurm's warning of the time limit; called in another thread."""
        self._request = request_reason(request)
        self._at_once = request["now"]
        self._console.note(f"          {escape(self._request)}{', at once' if request['now'] else ''}")
        os.kill(os.getpid(), signal.SIGUSR1 if request.get("time_limit") else signal.SIGTERM)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        supervisor = self.supervisor
        warning, stopping = number in WARNINGS, supervisor is not None and supervisor.stopping
        if warning and (stopping or self._ending):
            return
        self.signal = number
        insists = self.asked and stopping
        self.asked = self.asked or not warning
        if self._at_once or supervisor is None or insists or not (stopping or supervisor.request_stop(number)):
            self._ending = True
            raise KeyboardInterrupt
        action = "the run is about to end" if supervisor.phase == "exporting" else supervisor.stop_action
        second = "SIGTERM twice stops it now" if warning else "a second signal stops it now"
        self._console.note(f"{signal.Signals(number).name}: {action} ({second})")


def check_main_thread() -> None:
    """Raises RequestError in another thread: Python handles signals only in the main one."""
    if threading.current_thread() is not threading.main_thread():
        found = "a run must be started in the main thread of its process, which handles its signals"
        hint = "call it there, or start the run in another process with launcher run or launcher resume"
        raise RequestError(Problem(found, hint=hint))


@contextmanager
def interruptible(console: RunConsole, directory: RunDir) -> Iterator[Interrupts]:
    """Handles signals and requests to stop inside the block. Raises Interrupted if the run is stopped at once.

    Ignores SIGHUP: the run continues when its terminal goes away.
    """
    interrupts = Interrupts(console)
    done = threading.Event()
    threading.Thread(target=_poll_requests, args=(directory, interrupts, done), daemon=True).start()
    previous: dict[int, Any] = {number: signal.signal(number, interrupts.handle) for number in STOP_SIGNALS}
    # Not a handler: processes started from here, such as Ray's, must ignore it too.
    previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield interrupts
    except KeyboardInterrupt:
        raise Interrupted(interrupts.signal or signal.SIGINT) from None
    finally:
        done.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _poll_requests(directory: RunDir, interrupts: Interrupts, done: threading.Event) -> None:
    """Passes on requests to stop until `done` is set. A second request may ask to stop at once."""
    last: dict[str, Any] | None = None
    while not done.wait(_POLL_SECONDS):
        request = directory.stop_request()
        if request and request != last:
            last = request
            with suppress(OSError):
                directory.event({"event": "stop_requested", "now": request["now"], "by": request["by"]})
            interrupts.cancel(request)

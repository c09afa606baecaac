"""The connection between a rank and its agent: orders arrive on standard input, reports leave through a pipe.

When standard input closes, the agent is gone and the rank exits, so that nothing is left running on a node. A rank
started without an agent (LAUNCHER_REPORT_FD unset) sends no reports and does not wait for orders.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from launcher.errors import AGENT_LOST_EXIT
from launcher.files import parse_lines
from launcher.records import EventReport, Go, RankEvent, RankReport

RecordEvent = Callable[[RankEvent], None]


class Control:
    """One rank's connection to its agent."""

    def __init__(self, report_fd: int | None) -> None:
        self._report_fd = report_fd
        self._lock = threading.Lock()
        self._orders: queue.Queue[Go] = queue.Queue()
        self.stop = threading.Event()
        if report_fd is not None:
            threading.Thread(target=self._listen, name="agent-orders", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Control:
        fd = os.environ.pop("LAUNCHER_REPORT_FD", None)
        return cls(int(fd) if fd else None)

    def wait_for_go(self) -> Go:
        """Waits for the agent's order to start and returns it; returns an empty order if there is no agent."""
        if self._report_fd is None:
            return {"env": {}}
        return self._orders.get()

    def report(self, report: RankReport) -> None:
        """Sends a report to the agent: a phase, an update, a failure."""
        if self._report_fd is None:
            return
        line = json.dumps(report) + "\n"
        with self._lock:
            os.write(self._report_fd, line.encode())

    def record_event(self, event: RankEvent) -> None:
        """Reports an event, which the supervisor writes to events.jsonl."""
        details = {key: value for key, value in event.items() if key != "event"}
        self.report(EventReport(report="event", time=time.time(), event=event["event"], details=details))

    def _listen(self) -> None:
        # Not sys.stdin.buffer: Python aborts at its exit while a thread reads from that.
        with open(sys.stdin.fileno(), "rb", closefd=False) as orders:
            for order in parse_lines(orders, _log_damaged):
                if "go" in order:
                    self._orders.put(order["go"])
                elif "stop" in order:
                    self.stop.set()
        os._exit(AGENT_LOST_EXIT)


def _log_damaged(line: bytes) -> None:
    """Logs an order that is not a JSON object."""
    message = f"skipped an order from the agent that is not a JSON object: {line.strip()[:200]!r}"
    # An agent that is killed while it writes an order leaves a torn line, and nobody reads stderr then.
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)

"""The lock that allows one launcher per run directory."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.errors import Problem, RequestError
from launcher.lock import STALE_SECONDS
from launcher.run_dir import RunDir


@contextmanager
def only_launcher_of(directory: RunDir) -> Iterator[None]:
    """Holds the lock of a run directory inside the block. Raises RequestError if another launcher holds it."""
    with directory.held() as held:
        if not held:
            raise RequestError(_locked_problem(directory))
        # A request to stop an earlier launcher does not apply to this one.
        directory.stop_file.unlink(missing_ok=True)
        yield


def _locked_problem(directory: RunDir) -> Problem:
    state, holder = directory.state(), directory.holder()
    process = str(holder) if holder else f"process {state.get('pid')} on {state.get('host')}"
    hint = "wait until it ends, or stop it with launcher cancel"
    if holder and holder.host != socket.gethostname():
        hint += f"; if that host is down, the lock expires {STALE_SECONDS:.0f} s after the launcher's last heartbeat"
    found = f"another launcher is running this run: state {state.get('state')}, {process}"
    return Problem(found, file=str(directory.path), hint=hint)

"""Stopping a run, wherever it runs."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, RequestError, RunFailed
from launcher.run_dir import ENDED, RunDir

if TYPE_CHECKING:
    from launcher.watch.status import RunStatus

_RECEIVED_SECONDS, _NOW_SECONDS = 15.0, 3.0
_LOOK_SECONDS = 1.0


def cancel_run(directory: RunDir, *, now: bool, wait: bool, echo: Callable[[str], None]) -> None:
    """Stops a run wherever it runs, and reports with `echo`. Raises RunFailed if nobody receives the request.

    The request goes through the run directory. Of a run that has ended, a Slurm job that is queued again is cancelled.
    """
    state = _state(directory)
    if state.get("state") in ENDED:
        _end_queued_job(directory, state, echo)
        return
    requests = _requests_received(directory)
    _request_stop(directory, now=now)
    if not _received(directory, requests, state, echo, now=now, wait=wait):
        return
    echo(f"{directory.path.name} was told to {'stop at once' if now else 'save and stop'}")
    if wait:
        _until(lambda: _ended(directory) or _lost(directory), None)
        if not _ended(directory):
            raise RunFailed(f"the launcher went away while it stopped the run: see launcher why {directory.path}")
        ended = _state(directory) or {"state": "it was only being planned, and nothing is left of it"}
        reason = f": {ended['reason']}" if ended.get("reason") else ""
        echo(f"{ended['state']}{reason}; updates made: {_updates(directory)}")


def _end_queued_job(directory: RunDir, state: dict[str, Any], echo: Callable[[str], None]) -> None:
    """Of a run that has ended nothing is to be stopped, but that Slurm may hold its job to start it again."""
    from launcher.slurm.queue import cancel_slurm_job, slurm_job_state

    name, job = directory.path.name, state.get("slurm_job_id")
    if state["state"] == "finished" or not job or slurm_job_state(job) != "PENDING":
        echo(f"{name} has ended already: {state['state']}")
        return
    cancel_slurm_job(job)
    echo(f"{name} has ended ({state['state']}), but Slurm had queued its job {job} again: cancelled that")


def _request_stop(directory: RunDir, *, now: bool) -> None:
    try:
        directory.request_stop(now=now)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        who = _owner(directory)
        found = f"you may not stop this run{f', which is {who}' if who else ''}: {error.strerror}"
        raise RequestError(Problem(found, file=str(directory.path))) from None


def _owner(directory: RunDir) -> str | None:
    try:
        return f"{directory.path.owner()}'s"
    except (OSError, KeyError):
        return None


def _received(
    directory: RunDir, requests: int, state: dict[str, Any], echo: Callable[[str], None], *, now: bool, wait: bool
) -> bool:
    """Whether the launcher at work took the request; False where the Slurm job was cancelled instead.

    Raises RunFailed where there is nobody to take it, and for a run that is not waited for.
    """

    def received() -> bool:
        return _ended(directory) or _requests_received(directory) > requests

    job = state.get("slurm_job_id")
    if _until(received, _NOW_SECONDS if now and job else _RECEIVED_SECONDS):
        return True
    if now and job:
        _cancel_job(directory, job, echo)
        return False
    if wait and not _lost(directory):
        echo(f"nobody has taken the request yet (state {_state(directory).get('state')}); it stands: waiting")
        _until(lambda: received() or _lost(directory), None)
    if not received():
        raise RunFailed(_not_received(directory, state))
    return True


def _cancel_job(directory: RunDir, job: str, echo: Callable[[str], None]) -> None:
    from launcher.slurm.queue import cancel_slurm_job

    cancel_slurm_job(job)
    directory.enter("stopped", reason=f"Slurm job {job} was cancelled")
    echo(f"nobody took the request within {_NOW_SECONDS:.0f} s: cancelled its Slurm job {job}")


def _not_received(directory: RunDir, state: dict[str, Any]) -> str:
    where = f"process {state.get('pid')} on {state.get('host')}"
    job = state.get("slurm_job_id")
    found = f"nobody took the request: state {state.get('state')}, {where}"
    lost = _lost(directory)
    if lost:
        found += "; nothing is heard of the run and no launcher holds it, so it ended without a word"
    hint = f"scancel {job}, or launcher cancel --now" if job else "see launcher status, and end that process by hand"
    return f"{found}\n  {'go on with launcher resume' if lost and not job else hint}"


def _state(directory: RunDir) -> dict[str, Any]:
    from launcher.watch.run_session import read_json

    return read_json(directory.state_file) or {}


def _requests_received(directory: RunDir) -> int:
    from launcher.watch.run_session import records

    return sum(event.get("event") == "stop_requested" for event in records(directory.events_file))


def _ended(directory: RunDir) -> bool:
    """Whether the run has ended; of one that was only being planned nothing is left."""
    return not directory.state_file.exists() or _state(directory).get("state") in ENDED


def _lost(directory: RunDir) -> bool:
    from launcher.watch.status import LOST

    return _brief(directory).state == LOST


def _updates(directory: RunDir) -> int:
    return _brief(directory).updates


def _brief(directory: RunDir) -> RunStatus:
    from launcher.watch.status import read_status_without_nodes

    return read_status_without_nodes(directory, time.time())


def _until(condition: Callable[[], bool], seconds: float | None) -> bool:
    """Whether the condition came to hold within the time."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True

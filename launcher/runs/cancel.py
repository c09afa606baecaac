"""Stopping a run on any host."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, RequestError, RunFailed
from launcher.run_dir import ENDED, RunDir

if TYPE_CHECKING:
    from launcher.watch.status import RunStatus

_RECEIPT_SECONDS, _RECEIPT_NOW_SECONDS = 15.0, 3.0
_POLL_SECONDS = 1.0


def cancel_run(directory: RunDir, *, now: bool, wait: bool, echo: Callable[[str], None]) -> None:
    """Stops a run on any host, and reports with `echo`. Raises RunFailed if no launcher receives the request.

    The request goes through the run directory. If the run has ended but Slurm has requeued its job, or another job was
    submitted to continue the run, that job is cancelled.
    """
    state = _state(directory)
    if state.get("state") in ENDED:
        _cancel_later_jobs(directory, state, echo)
        return
    requests = _requests_received(directory)
    _request_stop(directory, now=now)
    if not _wait_for_receipt(directory, requests, state, echo, now=now, wait=wait):
        return
    echo(f"{directory.path.name}: stop requested, {'at once' if now else 'after saving'}")
    if wait:
        _wait_until(lambda: _ended(directory) or _lost(directory), None)
        if not _ended(directory):
            raise RunFailed(f"the launcher died while stopping the run: see launcher why {directory.path}")
        ended = _state(directory) or {"state": "stopped while planning, and its directory was removed"}
        reason = f": {ended['reason']}" if ended.get("reason") else ""
        echo(f"{ended['state']}{reason}; updates made: {_updates(directory)}")


def _cancel_later_jobs(directory: RunDir, state: dict[str, Any], echo: Callable[[str], None]) -> None:
    """Cancels the Slurm jobs that would continue a run that has ended: its own if it was requeued, and the next one."""
    from launcher.slurm.queue import cancel_slurm_job, slurm_job_state
    from launcher.watch.run_session import continued_by

    name, job = directory.path.name, state.get("slurm_job_id")
    found: list[str] = []
    if state["state"] == "stopped" and job:
        # The launcher may be about to submit the next job: it reads this file afterwards.
        with suppress(OSError):
            directory.request_stop(now=False)
    if state["state"] != "finished" and job and slurm_job_state(job) == "PENDING":
        cancel_slurm_job(job)
        found.append(f"{job}, which was requeued")
    if (following := continued_by(directory, state)) and slurm_job_state(following) is not None:
        cancel_slurm_job(following)
        found.append(f"{following}, which was submitted to continue it")
    if not found:
        echo(f"{name} has already ended: {state['state']}")
        return
    echo(f"{name} had already ended ({state['state']}); cancelled its Slurm job {' and '.join(found)}")


def _request_stop(directory: RunDir, *, now: bool) -> None:
    try:
        directory.request_stop(now=now)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        owner = _owner(directory)
        found = f"you do not have permission to stop this run{f' of {owner}' if owner else ''}: {error.strerror}"
        raise RequestError(Problem(found, file=str(directory.path))) from None


def _owner(directory: RunDir) -> str | None:
    try:
        return directory.path.owner()
    except (OSError, KeyError):
        return None


def _wait_for_receipt(
    directory: RunDir, requests: int, state: dict[str, Any], echo: Callable[[str], None], *, now: bool, wait: bool
) -> bool:
    """Whether the launcher of the run received the request; False if the Slurm job was cancelled instead.

    Raises RunFailed if no launcher is left to receive it, or if it is not received in time without `wait`.
    """

    def received() -> bool:
        return _ended(directory) or _requests_received(directory) > requests

    job = state.get("slurm_job_id")
    if _wait_until(received, _RECEIPT_NOW_SECONDS if now and job else _RECEIPT_SECONDS):
        return True
    if now and job:
        _cancel_job(directory, job, echo)
        return False
    if wait and not _lost(directory):
        echo(f"the launcher has not received the request yet (state {_state(directory).get('state')}); waiting")
        _wait_until(lambda: received() or _lost(directory), None)
    if not received():
        raise RunFailed(_not_received_message(directory, state))
    return True


def _cancel_job(directory: RunDir, job: str, echo: Callable[[str], None]) -> None:
    from launcher.slurm.queue import cancel_slurm_job

    cancel_slurm_job(job)
    directory.enter("stopped", reason=f"Slurm job {job} was cancelled")
    echo(f"no launcher received the request within {_RECEIPT_NOW_SECONDS:.0f} s: cancelled the Slurm job {job}")


def _not_received_message(directory: RunDir, state: dict[str, Any]) -> str:
    where = f"process {state.get('pid')} on {state.get('host')}"
    job = state.get("slurm_job_id")
    found = f"no launcher received the request: state {state.get('state')}, {where}"
    lost = _lost(directory)
    if lost:
        found += "; the run has no heartbeat and no launcher holds its lock, so its launcher has died"
    hint = f"scancel {job}, or launcher cancel --now" if job else "see launcher status, and end that process by hand"
    return f"{found}\n  {'resume the run with launcher resume' if lost and not job else hint}"


def _state(directory: RunDir) -> dict[str, Any]:
    from launcher.watch.run_session import read_json

    return read_json(directory.state_file) or {}


def _requests_received(directory: RunDir) -> int:
    from launcher.watch.run_session import records

    return sum(event.get("event") == "stop_requested" for event in records(directory.events_file))


def _ended(directory: RunDir) -> bool:
    """Whether the run has ended. A run that was stopped while planning leaves no directory."""
    return not directory.state_file.exists() or _state(directory).get("state") in ENDED


def _lost(directory: RunDir) -> bool:
    from launcher.watch.status import LOST

    return _status(directory).state == LOST


def _updates(directory: RunDir) -> int:
    return _status(directory).updates


def _status(directory: RunDir) -> RunStatus:
    from launcher.watch.status import read_status_without_nodes

    return read_status_without_nodes(directory, time.time())


def _wait_until(condition: Callable[[], bool], seconds: float | None) -> bool:
    """Whether the condition became true within the time; None waits without a limit."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True

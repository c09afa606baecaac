"""`launcher cancel`: stop a run, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from launcher.cli.watching import OUTPUT_DIR, RUN, reading
from launcher.errors import RunFailed
from launcher.run_dir import ENDED, RunDir

_HEARD_SECONDS = 15.0
_LOOK_SECONDS = 1.0


def cancel(
    run: str = RUN,
    now: bool = typer.Option(False, "--now", help="Stop at once, without a checkpoint."),
    wait: bool = typer.Option(True, help="Wait for the run's end."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Stop a run wherever it runs: after its update and a checkpoint, or at once with --now.

    The request goes through the run directory. Where nobody takes it and --now is given, the run's Slurm job is
    cancelled.
    """
    from launcher.watch.find import find_run

    with reading():
        _cancel(find_run(run, output_dir), now=now, wait=wait)


def _cancel(directory: RunDir, *, now: bool, wait: bool) -> None:
    state = directory.state()
    if state.get("state") in ENDED:
        typer.echo(f"{directory.path.name} has ended already: {state['state']}")
        return
    requests = _times_heard(directory)
    directory.request_stop(now=now)
    if not _until(lambda: _ended(directory) or _times_heard(directory) > requests, _HEARD_SECONDS):
        _unheard(directory, state, now=now)
    typer.echo("the run was told to stop at once" if now else "the run was told to save and stop")
    if wait:
        _until(lambda: _ended(directory) or _lost(directory), None)
        if not _ended(directory):
            raise RunFailed(f"the launcher went away while it stopped the run: see launcher why {directory.path}")
        ended = directory.state() or {"state": "it was only being planned, and nothing is left of it"}
        reason = f": {ended['reason']}" if ended.get("reason") else ""
        typer.echo(f"{ended['state']}{reason}; updates made: {len(directory.metrics())}")


def _unheard(directory: RunDir, state: dict[str, Any], *, now: bool) -> None:
    """Nobody took the request: cancels the Slurm job if there is one to be cancelled. Raises RunFailed otherwise."""
    where = f"process {state.get('pid')} on {state.get('host')}"
    job = state.get("slurm_job_id")
    with directory.held() as free:
        lost = free
    if job and now:
        from launcher.submit.cancel import cancel_slurm_job

        cancel_slurm_job(job)
        directory.enter("stopped", reason=f"Slurm job {job} was cancelled")
        return
    found = f"nobody took the request within {_HEARD_SECONDS:.0f} s: state {state.get('state')}, {where}"
    if lost:
        found += "; no launcher holds this run, so it ended without a word"
    mend = f"scancel {job}, or launcher cancel --now" if job else "see launcher status, and end that process by hand"
    raise RunFailed(f"{found}\n  {'go on with launcher resume' if lost and not job else mend}")


def _times_heard(directory: RunDir) -> int:
    return sum(event["event"] == "stop_requested" for event in directory.events())


def _ended(directory: RunDir) -> bool:
    """Whether the run has ended; of one that was only being planned nothing is left."""
    return directory.state().get("state", ENDED[0]) in ENDED


def _lost(directory: RunDir) -> bool:
    from launcher.watch.status import LOST, read_brief

    return read_brief(directory, time.time()).state == LOST


def _until(condition: Callable[[], bool], seconds: float | None) -> bool:
    """Whether the condition came to hold within the time."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True

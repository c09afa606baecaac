"""Finds run directories: by path, name, start of a name, or job name; or all in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import Problem, RequestError, nearest
from launcher.run_dir import RunDir
from launcher.watch.run_session import records, seconds_of

_RUN_FILES = ("state.json", "plan.json", "events.jsonl")
_STAMP = re.compile(r"^-(?:\d{8}-\d{6}|slurm-\w+)(?:-\d+)?$")
"""The part of a run's name after its job's name."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, or a copy of one. Raises PermissionError if it may not be read."""
    return any((folder / name).is_file() for name in _RUN_FILES)


def runs_under(output_dir: Path) -> list[RunDir]:
    """Every run directory directly in a folder, by name, and every folder that may not be read: it may be a run.

    Raises RequestError if the folder itself cannot be read.
    """
    try:
        return [RunDir(path) for path in sorted(output_dir.iterdir()) if _may_be_run(path)]
    except OSError as error:
        found = f"cannot be read: {error.strerror}"
        hint = "give the folder of the runs with --output-dir"
        raise RequestError(Problem(found, file=str(output_dir), key="--output-dir", hint=hint)) from None


def _may_be_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except OSError:
        return True


def find_run(name: str, output_dir: Path) -> RunDir:
    """The run at the path `name`; else in `output_dir` the run with this name, the newest run of the job with this
    name, or the only run whose name starts with it.

    Raises RequestError if no run is found, with the nearest names, or if several names start with it.
    """
    for folder in (Path(name), output_dir / name):
        if is_run(folder):
            return RunDir(folder.resolve())
    runs = runs_under(output_dir) if output_dir.is_dir() else []
    found = _newest_of_job(name, runs) or _starting_with(name, runs, output_dir)
    if found is not None:
        return RunDir(found.path.resolve())
    if Path(name).is_dir():
        what = f"this is not a run directory: it contains none of {', '.join(_RUN_FILES)}"
        raise RequestError(Problem(what, file=name, hint=_known_runs(name, runs, output_dir)))
    what = f"run {name!r} was not found, here or in {output_dir}"
    raise RequestError(Problem(what, hint=_known_runs(name, runs, output_dir)))


def _newest_of_job(job: str, runs: Sequence[RunDir]) -> RunDir | None:
    """The run of a job that started last."""
    named = [run for run in runs if run.path.name.startswith(job) and _STAMP.match(run.path.name.removeprefix(job))]
    return max(named, key=lambda run: (_start_time(run), run.path.name), default=None)


def _start_time(run: RunDir) -> float:
    """The time of a run's first event; 0 if it is not known."""
    try:
        first = next(records(run.events_file), {})
    except OSError:
        return 0.0
    return seconds_of(first.get("time")) or 0.0


def _starting_with(name: str, runs: Sequence[RunDir], output_dir: Path) -> RunDir | None:
    """The only run whose name starts with `name`, or None. Raises RequestError if there are several."""
    found = [run for run in runs if name and run.path.name.startswith(name)]
    if len(found) > 1:
        what = f"the names of {len(found)} runs in {output_dir} start with {name!r}"
        raise RequestError(Problem(what, hint=f"choose one of: {_listed(found)}"))
    return found[0] if found else None


def _known_runs(name: str, runs: Sequence[RunDir], output_dir: Path) -> str:
    if not runs:
        return f"{output_dir} contains no run; give another folder with --output-dir"
    close = nearest(Path(name).name, [run.path.name for run in runs])
    return f"did you mean {close}?" if close else f"the runs in {output_dir}, by name: {_listed(runs)}"


def _listed(runs: Sequence[RunDir], most: int = 5) -> str:
    names = [run.path.name for run in runs[-most:]]
    return ("…, " if len(runs) > most else "") + ", ".join(names)

"""Finding run directories: by path, by name or the beginning of one, by job, and all there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import Problem, RequestError, nearest
from launcher.run_dir import RunDir
from launcher.watch.session import records, seconds_of

_MARKS = ("state.json", "plan.json", "events.jsonl")
_STAMP = re.compile(r"^-(?:\d{8}-\d{6}|slurm-\w+)(?:-\d+)?$")
"""What a run's name has after its job's."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, or a copy of one. Raises PermissionError where that may not be known."""
    return any((folder / name).is_file() for name in _MARKS)


def runs_under(output_dir: Path) -> list[RunDir]:
    """Every run directory right under a folder, by name, with folders that may not be looked into: they may be runs.

    Raises RequestError where the folder itself cannot be read.
    """
    try:
        return [RunDir(path) for path in sorted(output_dir.iterdir()) if _may_be_run(path)]
    except OSError as error:
        found = f"cannot be read: {error.strerror}"
        hint = "say with --output-dir where the runs lie"
        raise RequestError(Problem(found, file=str(output_dir), key="--output-dir", hint=hint)) from None


def _may_be_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except OSError:
        return True


def find_run(name: str, output_dir: Path) -> RunDir:
    """The run at the path `name`; or under `output_dir` that of this name, the newest of the job of this name, or the
    only one whose name begins so.

    Raises RequestError where there is none, with the run names nearest to it, and where several begin so.
    """
    for folder in (Path(name), output_dir / name):
        if is_run(folder):
            return RunDir(folder.resolve())
    runs = runs_under(output_dir) if output_dir.is_dir() else []
    found = _of_job(name, runs) or _beginning(name, runs, output_dir)
    if found is not None:
        return RunDir(found.path.resolve())
    if Path(name).is_dir():
        what = f"this is not a run directory: there is none of {', '.join(_MARKS)} in it"
        raise RequestError(Problem(what, file=name, hint=_known(name, runs, output_dir)))
    what = f"there is no run {name!r}, here or in {output_dir}"
    raise RequestError(Problem(what, hint=_known(name, runs, output_dir)))


def _of_job(job: str, runs: Sequence[RunDir]) -> RunDir | None:
    """The run of a job that began last."""
    named = [run for run in runs if run.path.name.startswith(job) and _STAMP.match(run.path.name.removeprefix(job))]
    return max(named, key=lambda run: (_began(run), run.path.name), default=None)


def _began(run: RunDir) -> float:
    """The time of a run's first event; 0 where it is not known."""
    try:
        first = next(records(run.events_file), {})
    except OSError:
        return 0.0
    return seconds_of(first.get("time")) or 0.0


def _beginning(name: str, runs: Sequence[RunDir], output_dir: Path) -> RunDir | None:
    """The only run whose name begins with `name`. Raises RequestError where there are several."""
    found = [run for run in runs if name and run.path.name.startswith(name)]
    if len(found) > 1:
        what = f"{len(found)} runs in {output_dir} begin with {name!r}"
        raise RequestError(Problem(what, hint=f"which of them: {_listed(found)}"))
    return found[0] if found else None


def _known(name: str, runs: Sequence[RunDir], output_dir: Path) -> str:
    if not runs:
        return f"there is no run in {output_dir}; --output-dir says where they lie"
    close = nearest(Path(name).name, [run.path.name for run in runs])
    return f"did you mean {close}?" if close else f"the runs in {output_dir}, newest names last: {_listed(runs)}"


def _listed(runs: Sequence[RunDir], most: int = 5) -> str:
    names = [run.path.name for run in runs[-most:]]
    return ("…, " if len(runs) > most else "") + ", ".join(names)

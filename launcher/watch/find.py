"""Finding run directories: by path, by name, and all there are."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import Problem, RequestError, nearest
from launcher.run_dir import RunDir

_MARKS = ("state.json", "plan.json", "events.jsonl")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, or a copy of one."""
    return any((folder / name).is_file() for name in _MARKS)


def runs_under(output_dir: Path) -> list[RunDir]:
    """Every run directory right under a folder, by name. Raises RequestError where the folder cannot be read."""
    try:
        return [RunDir(path) for path in sorted(output_dir.iterdir()) if is_run(path)]
    except OSError as error:
        found = f"cannot be read: {error.strerror}"
        mend = "say with --output-dir where the runs lie"
        raise RequestError(Problem(found, file=str(output_dir), key="--output-dir", mend=mend)) from None


def find_run(name: str, output_dir: Path) -> RunDir:
    """The run at the path `name`, or of that name under `output_dir`.

    Raises RequestError where there is none, with the run names nearest to it.
    """
    for folder in (Path(name), output_dir / name):
        if is_run(folder):
            return RunDir(folder.resolve())
    if Path(name).is_dir():
        found = f"this is not a run directory: there is none of {', '.join(_MARKS)} in it"
        raise RequestError(Problem(found, file=name, mend=_known(name, output_dir)))
    raise RequestError(Problem(f"there is no run {name!r}, here or in {output_dir}", mend=_known(name, output_dir)))


def _known(name: str, output_dir: Path) -> str:
    names = [run.path.name for run in runs_under(output_dir)] if output_dir.is_dir() else []
    if not names:
        return f"there is no run in {output_dir}; --output-dir says where they lie"
    close = nearest(Path(name).name, names)
    if close:
        return f"did you mean {close}?"
    return f"the runs in {output_dir}, newest names last: {', '.join(names[-5:])}"

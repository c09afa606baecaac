"""A job with its source: its file, its overrides and the line of every key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.job.read import COMMAND_LINE, Lines, apply_overrides, location_of, override_key, read_data, validate_job
from launcher.job.schema import AnyJob, ScriptJob

_USAGE = "launcher exec job.yaml -- train.py arguments..., or script.command in the job file"


@dataclass(frozen=True)
class LoadedJob:
    """A valid job. `origin` names it in messages: its file, if it has one. Overridden keys have line 0."""

    job: AnyJob
    origin: str
    file: Path | None = None
    overrides: tuple[str, ...] = ()
    lines: Lines = field(default_factory=dict)

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Adds the file and line to each problem of a RequestError in the block that names one of the job's keys."""
        try:
            yield
        except RequestError as error:
            raise RequestError(*map(self._located, error.problems)) from None

    def lines_in(self, section: str) -> dict[str, int]:
        """The line of each key of a section, by its dotted name in that section."""
        return {".".join(path[1:]): line for path, line in self.lines.items() if path[0] == section and path[1:]}

    def _located(self, problem: Problem) -> Problem:
        key = tuple((problem.key or "").split("."))
        if self.file is None or problem.file is not None or key[0] not in type(self.job).model_fields:
            return problem
        file, line = location_of(key, self.lines, self.origin)
        return replace(problem, file=file, line=line)


def load_job(
    source: Path | str | Mapping[str, Any], *overrides: str, command: Sequence[str] | None = None
) -> LoadedJob:
    """The job of a YAML file, or of a mapping of its sections, with the overrides `section.key=value` applied.

    In a mapping, paths may be Path objects.

    A job with a `script` section is a ScriptJob, any other a Job. `command` is a script and its arguments: it makes
    the job a ScriptJob; an empty one uses the job's script.command. Raises RequestError with every problem found, each
    with its line.
    """
    _check_types(source, overrides)
    if isinstance(source, Mapping):
        data, file, origin = _copied(source), None, "the job"
        lines: Lines = dict.fromkeys(apply_overrides(data, overrides), COMMAND_LINE)
    else:
        file = Path(source)
        origin = str(file)
        data, lines = read_data(file, overrides)
    if command is not None:
        section = data.setdefault("script", {})
        if command and isinstance(section, dict):
            data["script"] = {**section, "command": list(command)}
    loaded = LoadedJob(validate_job(data, lines, origin), origin, file, overrides, lines)
    if command is not None and isinstance(loaded.job, ScriptJob) and not loaded.job.script.command:
        raise RequestError(Problem("no script is named", file=origin, key="script.command", hint=_USAGE))
    return loaded


def check_loaded(job: Any) -> None:
    """Raises RequestError if `job` is not a LoadedJob, but for example the path of a job file."""
    if not isinstance(job, LoadedJob):
        found = f"a job from load_job is needed, found {type(job).__name__}"
        raise RequestError(Problem(found, hint="call load_job with the job file or the mapping first"))


def _check_types(source: Any, overrides: Sequence[Any]) -> None:
    if not isinstance(source, str | Path | Mapping):
        found = f"a job must be a file or a mapping, found {type(source).__name__}"
        raise RequestError(Problem(found, hint='load_job("job.yaml"), or load_job({"model": …, "data": …})'))
    for override in overrides:
        if not isinstance(override, str):
            found = f"an override must be text, section.key=value, found {type(override).__name__}"
            raise RequestError(Problem(found, hint='for example load_job("job.yaml", "train.max_steps=20")'))


def _copied(value: Any) -> Any:
    """A copy of a value of a mapping, with paths as text, as a YAML file has them."""
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def sets_key(overrides: Sequence[str], *key: str) -> bool:
    """Whether one of the overrides sets a key."""
    return any(override_key(override) == key for override in overrides)

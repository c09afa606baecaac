"""Where a job's keys stand, added to problems that were found later than the file was read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.job.read import COMMAND_LINE, Lines, load_yaml, override_key, place_of, read_text
from launcher.job.schema import Job


@contextmanager
def placing(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Gives every RequestError from inside that names a key of the job, and no file, the file and the line."""
    try:
        yield
    except RequestError as error:
        _, lines = load_yaml(read_text(path), str(path))
        lines.update({override_key(override): COMMAND_LINE for override in overrides})
        raise RequestError(*(_placed(problem, lines, str(path)) for problem in error.problems)) from None


def _placed(problem: Problem, lines: Lines, origin: str) -> Problem:
    key = tuple((problem.key or "").split("."))
    if problem.file is not None or key[0] not in Job.model_fields:
        return problem
    file, line = place_of(key, lines, origin)
    return replace(problem, file=file, line=line)

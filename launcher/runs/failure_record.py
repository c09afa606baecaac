"""Recording that a run failed, without hiding the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape

from launcher.errors import FailureCode, code_of, first_line
from launcher.run_dir import RunDir


@contextmanager
def printing_errors(note: Callable[[str], None], what: str) -> Iterator[None]:
    """Prints errors raised in the block, which follows a failure and must not hide it."""
    try:
        yield
    except Exception as error:
        note(f"          {what}: {escape(first_line(error))}")


def record_failure(
    directory: RunDir, error: BaseException, note: Callable[[str], None], code: FailureCode | None = None
) -> None:
    """Writes the state "failed" with the error and its code.

    Raises nothing: if it cannot be written, as on a full disk, `note` prints why, and the caller raises `error`.
    """
    directory.release_reserve()
    with printing_errors(note, f"the failure could not be written to {escape(str(directory.path))}"):
        directory.enter("failed", reason=first_line(error), message=str(error), code=code or code_of(error))

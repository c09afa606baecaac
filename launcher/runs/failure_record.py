"""Recording that a run failed, without hiding the error."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape

from launcher.errors import FailureCode, code_of, first_line
from launcher.run_dir import RunDir


def record_failure(
    directory: RunDir, error: BaseException, note: Callable[[str], None], code: FailureCode | None = None
) -> None:
    """Writes the state "failed" with the error and its code.

    Raises nothing: if it cannot be written, as on a full disk, `note` prints why, and the caller raises `error`.
    """
    try:
        directory.enter("failed", reason=first_line(error), message=str(error), code=code or code_of(error))
    except Exception as second:
        path, reason = escape(str(directory.path)), escape(first_line(second))
        note(f"          the failure could not be written to {path}: {reason}")

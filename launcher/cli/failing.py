"""Recording that a run failed, without hiding what failed."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape

from launcher.errors import FailureCode, code_of, first_line
from launcher.run_dir import RunDir


def record_failure(
    directory: RunDir, error: BaseException, note: Callable[[str], None], code: FailureCode | None = None
) -> None:
    """Writes the state "failed" with the error and its code. Raises nothing.

    What goes wrong with the writing, as on a full disk, is printed by `note`: the first error is the one that counts.
    """
    try:
        directory.enter("failed", reason=first_line(error), message=str(error), code=code or code_of(error))
    except Exception as second:
        note(
            f"          the failure could not be written to {escape(str(directory.path))}: {escape(first_line(second))}"
        )

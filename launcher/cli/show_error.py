"""Errors printed for people, without a traceback."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from launcher.errors import LauncherError, Problem, RequestError
from launcher.watch.terminal_safe import plain

_MOST_PROBLEMS = 20
_MOST_CHARACTERS = 2000
"""Per line: a value in a message can be of any length."""


def show_error(error: LauncherError) -> None:
    """Prints an error to standard error; for invalid input every problem."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not isinstance(error, RequestError):
        console.print(Text.assemble(("error: ", "bold red"), "\n".join(_lines(str(error)))))
        return
    for problem in error.problems[:_MOST_PROBLEMS]:
        console.print(_problem_text(problem))
    if (left_out := len(error.problems) - _MOST_PROBLEMS) > 0:
        console.print(f"and {left_out} more problems")


def _problem_text(problem: Problem) -> Text:
    first, *rest = _lines(str(problem))
    text = Text.assemble(("error: ", "bold red"), first)
    for line in rest:
        text.append(f"\n{line}", style="dim" if problem.hint else "")
    return text


def _lines(text: str) -> list[str]:
    """The lines of a message, without control sequences and no longer than can be read."""
    lines = [plain(line) for line in text.splitlines()] or [""]
    return [line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + "…" for line in lines]

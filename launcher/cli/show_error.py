"""Errors printed for people, without a traceback."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from launcher.errors import LauncherError, Problem, RequestError


def show_error(error: LauncherError) -> None:
    """Prints an error to standard error; for invalid input every problem."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not isinstance(error, RequestError):
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        return
    for problem in error.problems:
        console.print(_problem_text(problem))


def _problem_text(problem: Problem) -> Text:
    first, *rest = str(problem).splitlines()
    text = Text.assemble(("error: ", "bold red"), first)
    for line in rest:
        text.append(f"\n{line}", style="dim" if problem.hint else "")
    return text

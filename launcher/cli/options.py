"""Arguments and options that commands share, and printing to a reader that may go away."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from launcher.errors import Problem, RequestError, RunFailed

JOB_FILE = typer.Argument(..., metavar="JOB.YAML", help="The job file.")
OVERRIDES = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values that replace those of the file.")
WITH_SCRIPT = {"allow_interspersed_args": False}
"""Settings of a command that takes a script after "--": the script's own options are left as they are."""
RUN = typer.Argument(..., metavar="RUN", help="A run directory, a run's name or its beginning, or a job's name.")
OUTPUT_DIR = typer.Option(Path("runs"), metavar="DIR", help="The folder of runs that are given by name.")
_USAGE = "launcher exec job.yaml [section.key=value]... -- train.py arguments..."


def split_command(rest: list[str]) -> tuple[list[str], list[str] | None]:
    """(overrides, the script and its arguments, which follow "--"; None without "--"). Raises RequestError."""
    if "--" not in rest:
        return rest, None
    place = rest.index("--")
    overrides, command = rest[:place], rest[place + 1 :]
    if not command or command == ["-m"]:
        raise RequestError(Problem("no script is named after --", hint=_USAGE))
    if options := [override for override in overrides if override.startswith("-")]:
        raise RequestError(Problem(f"{options[0]}: options belong before the job file", hint=_USAGE))
    return overrides, command


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Ends quietly on Ctrl-C and when the output's reader goes away; reports what cannot be read of a run.

    A character that the output's encoding does not have is printed as "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except PermissionError as error:
        raise RequestError(Problem("you may not read this", file=str(error.filename))) from None
    except OSError as error:
        raise RunFailed(str(error)) from None

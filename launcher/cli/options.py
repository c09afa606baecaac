"""Arguments and options that commands share, and a clean exit for commands that only print."""

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
OVERRIDES = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values that replace those in the file.")
DETACH = typer.Option(False, "--detach", help="Run in the background, and print how to follow the run.")
WITH_SCRIPT = {"allow_interspersed_args": False}
"""Settings of a command that takes a script after "--": options of the script are not parsed."""
RUN = typer.Argument(..., metavar="RUN", help="A run directory, a run's name or a prefix of it, or a job's name.")
RUN_OR_URL = typer.Argument(..., metavar="RUN", help="As for status: a run directory or a name; or the URL of a run.")
OUTPUT_DIR = typer.Option(Path("runs"), metavar="DIR", help="The folder in which runs are looked up by name.")
_USAGE = "launcher exec job.yaml [section.key=value]... -- train.py arguments..."


def split_command(rest: list[str]) -> tuple[list[str], list[str] | None]:
    """Splits arguments at "--" into overrides and a script with its arguments; without "--" the latter is None.

    Raises RequestError.
    """
    if "--" not in rest:
        return rest, None
    place = rest.index("--")
    overrides, command = rest[:place], rest[place + 1 :]
    if not command or command == ["-m"]:
        raise RequestError(Problem("a script is missing after --", hint=_USAGE))
    if options := [override for override in overrides if override.startswith("-")]:
        raise RequestError(Problem(f"{options[0]}: options go before the job file", hint=_USAGE))
    return overrides, command


@contextlib.contextmanager
def exiting_cleanly() -> Iterator[None]:
    """Exits quietly on Ctrl-C and when the output pipe closes; raises RequestError or RunFailed for unreadable files.

    A character that the output's encoding lacks is printed as "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except PermissionError as error:
        raise RequestError(Problem("you do not have permission to read this", file=str(error.filename))) from None
    except OSError as error:
        raise RunFailed(str(error)) from None

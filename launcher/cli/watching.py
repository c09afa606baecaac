"""What the watching verbs share: their options, and a standard output that may be closed early."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from launcher.errors import Problem, RequestError

RUN = typer.Argument(..., metavar="RUN", help="A run directory, or a run's name.")
OUTPUT_DIR = typer.Option(Path("runs"), metavar="DIR", help="Where runs lie that are given by name.")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Ends quietly with Ctrl-C and where the output's reader has gone; tells plainly what of a run may not be read."""
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

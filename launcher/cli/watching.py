"""What the watching verbs share: their options, and a standard output that may be closed early."""

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

RUN = typer.Argument(..., metavar="RUN", help="A run directory; a run's name, or how it begins; or a job's name.")
OUTPUT_DIR = typer.Option(Path("runs"), metavar="DIR", help="Where runs lie that are given by name.")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Ends quietly with Ctrl-C and where the output's reader has gone; tells plainly what of a run cannot be read.

    What the output's encoding has no character for comes out as "?".
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

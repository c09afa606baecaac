"""The command line: one short file per command. Nothing here imports torch, ray or deepspeed before it is needed."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from rich.console import Console

from launcher.cli import (
    cache,
    cancel,
    checkpoints,
    doctor,
    exec,
    export,
    init,
    lint,
    logs,
    lr,
    node,
    plan,
    resume,
    run,
    schema,
    status,
    submit,
    upload,
    watch,
    why,
)
from launcher.cli.help_text import reflowed
from launcher.cli.show_error import show_error
from launcher.errors import LauncherError, os_error_text
from launcher.files import keep_private
from launcher.version import __version__

_PANELS: dict[str, tuple[Any, ...]] = {
    "Before a run": (init.init, plan.plan, lr.lr, lint.lint, doctor.doctor, schema.schema, cache.cache),
    "Running": (run.run, resume.resume, cancel.cancel, exec.exec_script, submit.submit, node.node),
    "Watching": (status.status, watch.watch, logs.logs, why.why, checkpoints.checkpoints),
    "Results": (export.export, upload.upload),
}
_MORE: dict[str, dict[str, Any]] = {
    "exec": {"context_settings": exec.CONTEXT},
    "submit": {"cls": submit.ScriptCommand},
    "node": {"context_settings": node.CONTEXT},
}
_WRITES_RUNS = ("run", "exec", "resume", "submit", "node", "export", "upload", "doctor")

app = typer.Typer(
    name="launcher",
    help="Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, with a generated learning rate.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        _name = _command.__name__.removesuffix("_script")
        app.command(_name, rich_help_panel=_panel, help=reflowed(_command.__doc__), **_MORE.get(_name, {}))(_command)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"launcher {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    _shown: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""
    if ctx.invoked_subcommand in _WRITES_RUNS:
        keep_private()


def main() -> None:
    """The `launcher` command. Exit status 2 for invalid input, 1 for a failed run, 130 for an interrupted one."""
    try:
        app()
    except LauncherError as error:
        show_error(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of the output has exited, as in `launcher plan … | head`. Python flushes again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        show_error(LauncherError(os_error_text(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(130)

"""The command line: one file a verb, each thin. Nothing here imports torch, ray or deepspeed before it must."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.text import Text

from launcher.cli import (
    cancel,
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
    watch,
    why,
)
from launcher.errors import LauncherError, Problem, RequestError, os_error_text
from launcher.files import keep_private
from launcher.version import __version__

app = typer.Typer(
    name="launcher",
    help="Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a learning rate that is right.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _verbs in {
    "Before a run": (init.init, plan.plan, lr.lr, lint.lint, doctor.doctor, schema.schema),
    "Running": (run.run, resume.resume, cancel.cancel, export.export),
    "Watching": (status.status, watch.watch, logs.logs, why.why),
}.items():
    for _verb in _verbs:
        app.command(_verb.__name__, rich_help_panel=_panel)(_verb)
app.command("exec", rich_help_panel="Running", context_settings=exec.CONTEXT)(exec.exec_script)
app.command("submit", rich_help_panel="Running", cls=submit.WithScript)(submit.submit)
app.command("node", rich_help_panel="Running", context_settings=node.CONTEXT)(node.node)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"launcher {__version__}")
        raise typer.Exit


_PRIVATE = ("run", "exec", "resume", "submit", "node", "export", "doctor")
"""The verbs that write run directories."""


@app.callback()
def _options(
    ctx: typer.Context,
    _shown: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the verb."""
    if ctx.invoked_subcommand in _PRIVATE:
        keep_private()


def main() -> None:
    """The `launcher` command. Exit status 2 for invalid input, 1 for a run that failed, 130 for one interrupted."""
    try:
        app()
    except LauncherError as error:
        show_error(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of the output has gone, as in `launcher plan … | head`. Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        show_error(LauncherError(os_error_text(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(130)


def show_error(error: LauncherError) -> None:
    """Prints what is wrong, a problem at a time, without a traceback."""
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

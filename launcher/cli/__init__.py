"""The command line: one file a verb, each thin. Nothing here imports torch, ray or deepspeed before it must."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from launcher import __version__
from launcher.cli import (
    cancel,
    doctor,
    exec,
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
from launcher.errors import LauncherError, Problem, RequestError

app = typer.Typer(
    name="launcher",
    help="Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a learning rate that is right.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("exec", context_settings=exec.CONTEXT)(exec.exec_script)
app.command("resume")(resume.resume)
app.command("submit")(submit.submit)
app.command("node", context_settings=node.CONTEXT)(node.node)
app.command("cancel")(cancel.cancel)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("watch")(watch.watch)
app.command("why")(why.why)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("lr")(lr.lr)
app.command("lint")(lint.lint)
app.command("init")(init.init)
app.command("schema")(schema.schema)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"launcher {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the verb."""


def main() -> None:
    """The `launcher` command. Exit status 2 for a bad request, 1 for a run that failed, 130 for one interrupted."""
    try:
        app()
    except LauncherError as error:
        show_error(error)
        sys.exit(error.exit_status)
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
        text.append(f"\n{line}", style="dim" if problem.mend else "")
    return text

"""`launcher resume`: go on with a run from its last complete checkpoint."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.console import RunConsole
from launcher.errors import Problem, RequestError
from launcher.plan.model import Plan
from launcher.run_dir import RunDir


def resume(run: Path = typer.Argument(..., metavar="RUN", help="A run directory.")) -> None:
    """Go on with a stopped or failed run from its last complete checkpoint."""
    from launcher.cli.run import carry_out

    directory = RunDir(run.resolve())
    if not directory.plan_file.is_file():
        raise RequestError(Problem("there is no plan.json here, so this is not a run directory", file=str(run)))
    plan = Plan.from_json(directory.plan_file.read_text())
    saved = directory.complete_checkpoints()
    if not saved:
        raise RequestError(Problem("there is no complete checkpoint to go on from", file=str(directory.checkpoints)))
    if saved[-1] >= plan.length.total_updates:
        raise RequestError(Problem(f"all {saved[-1]} updates are made already", file=str(run)))
    console = RunConsole()
    console.note(f"going on after update {saved[-1]} of {plan.length.total_updates}")
    directory.event("resume", update=saved[-1])
    with console.closing():
        carry_out(plan, directory, console, directory.checkpoint(saved[-1]))

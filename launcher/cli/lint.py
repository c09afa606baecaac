"""`launcher lint`: check DeepSpeed JSONs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Devices(enum.StrEnum):
    """The values of --device."""

    CPU = "cpu"
    CUDA = "cuda"


def lint(
    files: Annotated[list[Path], typer.Argument(help="DeepSpeed JSON files.", metavar="FILE.json…")],
    fix: Annotated[bool, typer.Option("--fix", help="Write the fixes that leave no choice.")] = False,
    world_size: Annotated[int | None, typer.Option(help="Number of ranks, for checking batch sizes.", min=1)] = None,
    device: Annotated[
        Devices | None,
        typer.Option(help="The device of the ranks, which decides what DeepSpeed supports. Default: this machine's."),
    ] = None,
    script: Annotated[
        bool, typer.Option("--script", help="The JSON is for your own training script (launcher exec).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check DeepSpeed JSONs for misspelt and removed keys, wrong types, and combinations that fail or do harm.

    Exit status 2 if there are errors.
    """
    from launcher.cli.lint_output import findings_json, print_findings
    from launcher.ds_config.catalogue import load_catalogue
    from launcher.ds_config.lint_files import lint_file
    from launcher.ds_config.loop_rules import MONITORS_AND_OPTIMIZERS
    from launcher.ds_config.target import Target
    from launcher.prepare.machine import measure_machine, missing_packages

    keys = load_catalogue()
    where = device.value if device else measure_machine().device
    missing = missing_packages(MONITORS_AND_OPTIMIZERS)
    target = Target(where, world_size, missing, script, dtype="fp32" if where == "cpu" else None)
    if keys.warning:
        typer.echo(f"warning: {keys.warning}", err=True)
    found = {str(path): lint_file(path, target, keys, fix=fix) for path in files}
    if json:
        typer.echo(findings_json(found))
    else:
        print_findings(found, where)
    if any(finding.severity == "error" for linted in found.values() for finding in linted.findings):
        raise typer.Exit(2)

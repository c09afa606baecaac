"""`launcher schema`: print the job file's JSON Schema."""

from __future__ import annotations

import json

import typer

from launcher.job.schema import json_schema


def schema() -> None:
    """Print the job file's JSON Schema, which editors use to complete and check keys."""
    typer.echo(json.dumps(json_schema(), indent=2))

"""`launcher schema`: the job file's JSON Schema."""

from __future__ import annotations

import json

import typer

from launcher.job import Job


def schema() -> None:
    """Print the job file's JSON Schema, with which editors complete and check keys."""
    document = Job.model_json_schema()
    document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    document["title"] = "launcher job file"
    typer.echo(json.dumps(document, indent=2))

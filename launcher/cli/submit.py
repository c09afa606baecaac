"""`launcher submit`: give a job to Slurm or to a Ray cluster, after it was checked."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from launcher.errors import Problem, RequestError
from launcher.job import Job, placing, read_job
from launcher.planning import check_job


class Target(StrEnum):
    """What a job is submitted to."""

    slurm = "slurm"
    ray = "ray"


def submit(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file."),
    overrides: list[str] = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values set over the file's."),
    to: Target = typer.Option(None, "--to", help="Default: slurm where the job has a slurm section."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print exactly what would be submitted, and submit nothing."),
    parsable: bool = typer.Option(False, "--parsable", help="Print the job's id alone."),
    dependency: str = typer.Option(None, help="Slurm: jobs to wait for, over slurm.dependency."),
    array: str = typer.Option(None, help="Slurm: indices of a job array, over slurm.array."),
    address: str = typer.Option(None, help="Ray: the dashboard's address, such as http://head:8265."),
    follow: bool = typer.Option(False, "--follow", help="Ray: print the job's output to its end."),
) -> None:
    """Submit a job to Slurm or to a Ray cluster. It is checked before, as far as can be seen from here."""
    given = {"slurm.dependency": dependency, "slurm.array": array}
    words = [*(overrides or ()), *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]
    job = read_job(job_file, words)
    target = to or _target(job, address)
    _check_options(target, {"--dependency": dependency, "--array": array}, {"--address": address, "--follow": follow})
    with placing(job_file, words):
        if target is Target.slurm:
            _to_slurm(job, job_file, words, dry_run, parsable)
        else:
            _to_ray(job, job_file, words, address, dry_run, parsable, follow)


def _target(job: Job, address: str | None) -> Target:
    if address is not None:
        return Target.ray
    if "slurm" in job.model_fields_set:
        return Target.slurm
    raise RequestError(
        Problem(
            "to Slurm or to Ray? The job has no slurm section, and no address of a Ray is given",
            mend="say --to slurm, or --to ray --address http://HEAD:8265",
        )
    )


def _check_options(target: Target, slurm: dict[str, object], ray: dict[str, object]) -> None:
    strange = ray if target is Target.slurm else slurm
    given = [name for name, value in strange.items() if value]
    if given:
        other = Target.ray if target is Target.slurm else Target.slurm
        found = f"{' and '.join(given)} is for {other}, and the job goes to {target}"
        raise RequestError(Problem(found, mend=f"leave it out, or say --to {other}"))


def _to_slurm(job: Job, job_file: Path, overrides: Sequence[str], dry_run: bool, parsable: bool) -> None:
    from launcher.submit.slurm import described, read_templates, slurm_request, submit_request, surroundings
    from launcher.submit.slurm_options import gpus_per_node

    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    cluster = job.cluster.model_copy(update={"gpus_per_node": gpus_per_node(job)})
    check_job(job.model_copy(update={"cluster": cluster}), str(job_file))
    here = surroundings()
    request = slurm_request(job, job_file, overrides, here, read_templates(job, here.cwd))
    if cluster.gpus_per_node and job.slurm.cpus_per_task is None and not job.slurm.exclusive:
        _note(messages, "slurm.cpus_per_task is not set: a node gives what the site grants, which may be one core")
    if dry_run:
        messages.print(Text(f"# in {shlex.quote(str(request.cwd))}: {request.command()}", style="dim"))
        typer.echo(request.script, nl=False)
        return
    submitted, said = submit_request(request, os.environ)
    if said:
        _note(messages, said)
    typer.echo(str(submitted) if parsable else described(request, submitted))


def _note(messages: Console, text: str) -> None:
    messages.print(Text.assemble(("note: ", "yellow"), text))


def _to_ray(
    job: Job,
    job_file: Path,
    overrides: Sequence[str],
    address: str | None,
    dry_run: bool,
    parsable: bool,
    follow: bool,
) -> None:
    from launcher.submit.ray import dashboard_address, ray_request, submit_to_ray

    where = dashboard_address(address, os.environ)
    request = ray_request(job, job_file.absolute(), overrides, where, Path.cwd())
    status = submit_to_ray(request, typer.echo, dry_run=dry_run, parsable=parsable, follow=follow)
    raise typer.Exit(status)

"""`launcher submit`: give a job to Slurm or to a Ray cluster, after it was checked."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from launcher.cli.exec import check_script, script_here, split
from launcher.cli.resume import job_of_run, planned_run
from launcher.errors import Problem, RequestError
from launcher.job import Job, ScriptJob, is_for_a_script, placing, read_job, read_script_job
from launcher.plan.facts import MachineFacts
from launcher.plan.resolve import check_request
from launcher.plan.schema import Script
from launcher.prepare.machine import measure_machine
from launcher.prepare.sources import find_data, find_model_folder
from launcher.runs.planning import check_job, check_script_job, lint_ds_config, load_ds_config


class Target(StrEnum):
    """What a job is submitted to."""

    slurm = "slurm"
    ray = "ray"


class WithScript(TyperCommand):
    """A command that a script of the user's own may follow, after "--"; its own options may stand anywhere before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Otherwise the "--" is taken away, and with it the place where the script begins.
        if "--" in args:
            place = args.index("--")
            args, ctx.obj = args[:place], args[place + 1 :]
        return super().parse_args(ctx, args)


def submit(
    ctx: typer.Context,
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file; with --resume a run directory."),
    overrides: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]... [-- SCRIPT [ARGUMENT]...]", help="Overrides; Slurm: a script as for exec."
    ),
    resume: bool = typer.Option(False, "--resume", help="Slurm: go on with a run, in as many nodes as cluster.nodes."),
    to: Target = typer.Option(None, "--to", help="Default: slurm where the job has a slurm section."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print exactly what would be submitted, and submit nothing."),
    parsable: bool = typer.Option(False, "--parsable", help="Print the job's id alone."),
    dependency: str = typer.Option(None, help="Slurm: jobs to wait for, over slurm.dependency."),
    array: str = typer.Option(None, help="Slurm: indices of a job array, over slurm.array."),
    address: str = typer.Option(None, help="Ray: the dashboard's address, such as http://head:8265."),
    follow: bool = typer.Option(False, "--follow", help="Ray: print the job's output to its end."),
) -> None:
    """Submit a job to Slurm or to a Ray cluster. It is checked before, as far as can be seen from here."""
    script = _script(ctx.obj, resume)
    given = {"slurm.dependency": dependency, "slurm.array": array}
    words = [*(overrides or ()), *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]
    job = job_of_run(planned_run(job_file), words) if resume else _job(job_file, words, script)
    target = to or _target(job, address)
    _check_options(target, {"--dependency": dependency, "--array": array}, {"--address": address, "--follow": follow})
    # A run directory has no lines in which keys could be placed.
    with nullcontext() if resume else placing(job_file, words):
        if target is Target.slurm:
            _to_slurm(job, job_file, words, script, dry_run, parsable, resume)
        elif resume:
            hint = "ray job submit … -- launcher resume RUN, with the run's absolute path"
            raise RequestError(Problem("--resume is for slurm, and the run goes to ray", hint=hint))
        elif script:
            hint = "ray job submit … -- launcher exec JOB.YAML -- SCRIPT [ARGUMENT]..."
            raise RequestError(Problem("a script is for slurm, and the job goes to ray", hint=hint))
        else:
            _to_ray(job, job_file, words, address, dry_run, parsable, follow)


def _script(arguments: list[str] | None, resume: bool) -> Script | None:
    """The script that is named after "--", if there is one. Raises RequestError."""
    if arguments is None:
        return None
    if resume:
        raise RequestError(Problem("--resume goes on with a run, as it was planned: no script is named then"))
    _, words = split(["--", *arguments])
    return script_here(words)


def _job(job_file: Path, words: Sequence[str], script: Script | None) -> Job:
    if script:
        return read_script_job(job_file, words)
    if is_for_a_script(job_file, words):
        hint = "launcher submit JOB.YAML -- SCRIPT [ARGUMENT]..."
        raise RequestError(Problem("this job is for a script of your own", file=str(job_file), hint=hint))
    return read_job(job_file, words)


def _target(job: Job, address: str | None) -> Target:
    if address is not None:
        return Target.ray
    if "slurm" in job.model_fields_set:
        return Target.slurm
    raise RequestError(
        Problem(
            "to Slurm or to Ray? The job has no slurm section, and no address of a Ray is given",
            hint="say --to slurm, or --to ray --address http://HEAD:8265",
        )
    )


def _check_options(target: Target, slurm: dict[str, object], ray: dict[str, object]) -> None:
    strange = ray if target is Target.slurm else slurm
    given = [name for name, value in strange.items() if value]
    if given:
        other = Target.ray if target is Target.slurm else Target.slurm
        found = f"{' and '.join(given)} is for {other}, and the job goes to {target}"
        raise RequestError(Problem(found, hint=f"leave it out, or say --to {other}"))


def _to_slurm(
    job: Job,
    job_file: Path,
    overrides: Sequence[str],
    script: Script | None,
    dry_run: bool,
    parsable: bool,
    resume: bool,
) -> None:
    from launcher.slurm.options import gpus_per_node
    from launcher.slurm.submit import describe_submission, read_templates, slurm_request, submit_context, submit_request

    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    cluster = job.cluster.model_copy(update={"gpus_per_node": gpus_per_node(job)})
    if overrides or not resume:
        _check(job.model_copy(update={"cluster": cluster}), job_file, script)
    here = submit_context()
    words = [*overrides, *(["--", *script.arguments] if script else [])]
    request = slurm_request(job, job_file, words, here, read_templates(job, here.cwd), resume=resume)
    if cluster.gpus_per_node and job.slurm.cpus_per_task is None and not job.slurm.exclusive:
        _note(messages, "slurm.cpus_per_task is not set: a node gives what the site grants, which may be one core")
    if dry_run:
        messages.print(Text(f"# in {shlex.quote(str(request.cwd))}: {request.command()}", style="dim"))
        typer.echo(request.script, nl=False)
        return
    submitted, said = submit_request(request, os.environ)
    if said:
        _note(messages, said)
    typer.echo(str(submitted) if parsable else describe_submission(request, submitted))


def _check(job: Job, job_file: Path, script: Script | None) -> None:
    """Raises RequestError for what can be told of the job from here."""
    if script is None:
        check_job(job, str(job_file))
        return
    assert isinstance(job, ScriptJob)
    check_script_job(job, str(job_file))
    check_script(script)
    if job.slurm.array_key:
        found = "the index would stand behind the script's own arguments"
        hint = "leave it out, and let the script read SLURM_ARRAY_TASK_ID"
        raise RequestError(Problem(found, key="slurm.array_key", hint=hint))


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
    from launcher.ray_jobs import dashboard_address, ray_request, submit_to_ray

    where = dashboard_address(address, os.environ)
    request = ray_request(job, job_file.absolute(), overrides, where, Path.cwd())
    _check_uploaded(job)
    _check_for_elsewhere(job, job_file)
    status = submit_to_ray(request, typer.echo, dry_run=dry_run, parsable=parsable, follow=follow)
    raise typer.Exit(status)


def _check_uploaded(job: Job) -> None:
    """Raises RequestError for a model or data that would be uploaded from this folder and are not in it."""
    from launcher.ray_jobs import path_in_upload

    here = Path.cwd()
    if path_in_upload(job.model.name_or_path, here):
        find_model_folder(job.model.name_or_path, job.model.gguf_file)
    for key in ("train", "eval"):
        named = getattr(job.data, key)
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        if names and all(path_in_upload(name, here) for name in names):
            find_data(named, f"data.{key}")


def _check_for_elsewhere(job: Job, job_file: Path) -> None:
    """Raises RequestError for what is wrong wherever the job runs. Paths of the cluster's own are not looked at."""
    from launcher.ray_jobs import path_in_upload

    if isinstance(job.deepspeed, str) and not path_in_upload(job.deepspeed, Path.cwd()):
        return
    user = load_ds_config(job, str(job_file))
    if job.cluster.gpus_per_node == "auto":
        told = "cluster.gpus_per_node is auto: the cluster alone sees how many ranks there are, and checks the rest"
        _note(Console(stderr=True, highlight=False, soft_wrap=True), told)
        return
    machine = _some_node()
    lint_ds_config(job, user, machine)
    check_request(job, user, machine)


def _some_node() -> MachineFacts:
    """A node of a cluster that is not seen from here, on which nothing is missing."""
    here = measure_machine()
    installed = dict.fromkeys(here.versions, "there")
    return here.model_copy(update={"gpus": 0, "device": "cpu", "versions": installed, "compiler": "c++"})

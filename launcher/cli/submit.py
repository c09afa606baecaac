"""`launcher submit`: submit a job to Slurm or to a Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from launcher.cli.options import split_command
from launcher.errors import Problem, RequestError
from launcher.runs.submit import Submission, SubmitTarget, choose_target, to_ray, to_slurm


class ScriptCommand(TyperCommand):
    """A command that takes a script after "--" and its own options anywhere before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # The parser would drop the "--", which marks where the script begins.
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
    resume: bool = typer.Option(False, "--resume", help="Slurm: resume a run."),
    to: SubmitTarget = typer.Option(None, "--to", help="Default: slurm if the job has a slurm section."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print exactly what would be submitted; submit nothing."),
    parsable: bool = typer.Option(False, "--parsable", help="Print only the job id."),
    dependency: str = typer.Option(None, help="Slurm: jobs to wait for, instead of the job file's."),
    array: str = typer.Option(None, help="Slurm: indices of a job array, instead of the job file's."),
    address: str = typer.Option(None, metavar="URL", help="Ray: the address of the dashboard (port 8265)."),
    follow: bool = typer.Option(False, "--follow", help="Ray: print the job's output until it ends."),
) -> None:
    """Check a job as far as this machine can, then submit it to Slurm or to a Ray cluster.

    --dependency and --array replace slurm.dependency and slurm.array. A resumed run uses cluster.nodes nodes. The
    address of a Ray dashboard looks like http://head:8265.
    """
    given = {"slurm.dependency": dependency, "slurm.array": array}
    words = [*(overrides or ()), *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]
    submission = Submission(job_file, tuple(words), _script(ctx.obj, resume), resume, dry_run, parsable, typer.echo)
    loaded = submission.load()
    target = to or choose_target(loaded.job, address)
    _check_options(target, {"--dependency": dependency, "--array": array}, {"--address": address, "--follow": follow})
    if target is SubmitTarget.slurm:
        to_slurm(submission, loaded)
    else:
        raise typer.Exit(to_ray(submission, loaded, address, follow=follow))


def _script(command: list[str] | None, resume: bool) -> tuple[str, ...]:
    """The script after "--" and its arguments, or nothing. Raises RequestError."""
    if command is None:
        return ()
    if resume:
        raise RequestError(Problem("--resume takes a run directory and overrides, no script"))
    return tuple(split_command(["--", *command])[1] or ())


def _check_options(target: SubmitTarget, slurm: dict[str, object], ray: dict[str, object]) -> None:
    """Raises RequestError for an option of the other target."""
    given = [name for name, value in (ray if target is SubmitTarget.slurm else slurm).items() if value]
    if given:
        other = SubmitTarget.ray if target is SubmitTarget.slurm else SubmitTarget.slurm
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        found = f"{' and '.join(given)} {verb} for {other}, but the job is submitted to {target}"
        raise RequestError(Problem(found, hint=f"leave {them} out, or add --to {other}"))

"""`launcher node`: the task of one node in a Slurm allocation."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.options import WITH_SCRIPT, split_command
from launcher.errors import Problem, RequestError
from launcher.runs import slurm_node, slurm_requests

CONTEXT = WITH_SCRIPT


def node(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file; with --resume a run directory."),
    rest: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]... [-- SCRIPT [ARGUMENT]...]", help="Overrides; a script as for exec."
    ),
    resume: bool = typer.Option(False, "--resume", help="JOB.YAML is a run directory: resume that run."),
    doctor: bool = typer.Option(False, "--doctor", help="Check the allocation's nodes; train nothing."),
    finished: bool = typer.Option(
        False, "--finished", help="Exit with 0 if this allocation's run has finished, else 1."
    ),
    stop: bool = typer.Option(
        False, "--stop", help="Ask this allocation's run to save and stop: the time limit is near."
    ),
) -> None:
    """Run a job in a Slurm allocation; srun starts this command once on every node.

    The nodes start a Ray cluster for this job alone. The first node supervises the run and exits with the run's status.
    """
    overrides, command = split_command(rest or [])
    if resume:
        if doctor or command:
            raise RequestError(Problem("--resume takes a run directory and overrides, no script and no --doctor"))
        if stop:
            slurm_requests.stop_resumed_run(job_file)
        elif finished:
            raise typer.Exit(0 if slurm_requests.resumed_run_has_finished(job_file) else 1)
        else:
            raise typer.Exit(slurm_node.resume_on_node(job_file, overrides))
    elif stop:
        slurm_requests.stop_run_of_job(job_file, overrides, command)
    elif finished:
        raise typer.Exit(0 if slurm_requests.run_of_job_has_finished(job_file, overrides, command) else 1)
    elif doctor:
        raise typer.Exit(slurm_node.examine_on_node(job_file, overrides, command))
    else:
        raise typer.Exit(slurm_node.run_on_node(job_file, overrides, command))

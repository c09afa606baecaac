"""`launcher doctor`: check the nodes that a job would run on."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.padding import Padding

from launcher.cli.console import RunConsole, preflight_table, print_whole
from launcher.cli.run import check_reach
from launcher.errors import Problem, RequestError
from launcher.job import placing, read_job
from launcher.job.schema import Job
from launcher.plan.resolve import resolve_world
from launcher.plan.schema import World
from launcher.run_dir import RunDir
from launcher.runs.planning import check_job


def doctor(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file."),
    overrides: list[str] = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values set over the file's."),
) -> None:
    """Place a job's nodes and check them as a run does before its ranks start. Trains nothing.

    Versions, clocks, the run directory's storage, free space, GPUs, and a small all-reduce over the network.
    Exit status 1 where a node will not do.
    """
    job = read_job(job_file, overrides or ())
    with placing(job_file, overrides or ()):
        machine = check_job(job, str(job_file)).machine
        _check_not_for_slurm(job, job_file)
        check_reach(job, machine)
        world = resolve_world(job, machine)
    examine(job, world, machine.versions)


def _check_not_for_slurm(job: Job, job_file: Path) -> None:
    """Raises RequestError where the nodes are Slurm's to give, and no Ray is named that has them."""
    from launcher.fleet.nodes import address_of

    nodes = job.cluster.nodes
    if nodes > 1 and "slurm" in job.model_fields_set and address_of(job.cluster.address) == "local":
        found = f"{nodes} nodes, which Slurm gives, and there is this machine alone"
        hint = f"srun --nodes={nodes} --ntasks-per-node=1 launcher node --doctor {shlex.quote(str(job_file))}"
        raise RequestError(Problem(found, key="cluster.nodes", hint=hint))


def examine(job: Job, world: World, versions: dict[str, str]) -> None:
    """Shows the nodes as they are found. Raises RunFailed where one will not do."""
    from launcher.fleet.nodes import NodeResources, Nodes, address_of
    from launcher.fleet.preflight import Requirements, preflight, raise_problems

    console, shown = RunConsole(), Console(highlight=False, soft_wrap=True)
    output_dir = Path(job.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    nodes = Nodes(NodeResources.of(world), console.note)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=output_dir) as folder:
        try:
            nodes.connect(address_of(job.cluster.address))
            nodes.place(job.cluster.wait_seconds)
            required = Requirements(world, versions, 0, os.environ, job.cluster.env)
            checks = preflight(nodes, required, RunDir(Path(folder).resolve()))
        finally:
            nodes.end(0.0)
            nodes.close()
    print_whole(shown, Padding(preflight_table(checks), (0, 0, 1, 0)))
    console.preflight_notes(checks)
    raise_problems(checks)
    console.note("[bold green]every node will do[/]")

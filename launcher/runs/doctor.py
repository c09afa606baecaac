"""Checking the nodes that a job would run on."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

from rich.console import Console
from rich.padding import Padding

from launcher.errors import Problem, RequestError
from launcher.job import AnyJob, LoadedJob
from launcher.job.schema import HealthChecks
from launcher.job.user_path import user_path
from launcher.plan.inputs import PlanInputs
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole, preflight_table, print_full_width
from launcher.runs.planning import check_job
from launcher.runs.reach import check_reach


def examine_job(loaded: LoadedJob) -> None:
    """Places the nodes of a job and prints the results of their checks.

    Raises RequestError, or RunFailed for an unfit node.
    """
    inputs = check_job(loaded).inputs
    with loaded.locate_errors():
        _check_not_for_slurm(loaded)
        check_reach(loaded.job, inputs.machine)
    examine(inputs)


def _check_not_for_slurm(loaded: LoadedJob) -> None:
    """Raises RequestError if the job needs nodes of Slurm, and no address of a Ray cluster is given."""
    from launcher.fleet.nodes import address_of

    job = loaded.job
    nodes = job.cluster.all_nodes
    if nodes > 1 and "slurm" in job.model_fields_set and address_of(job.cluster.address) == "local":
        found = f"the job asks for {nodes} nodes of Slurm, and only this machine is available"
        hint = f"srun --nodes={nodes} --ntasks-per-node=1 launcher node --doctor {shlex.quote(loaded.origin)}"
        raise RequestError(Problem(found, key="cluster.nodes", hint=hint))


def examine(inputs: PlanInputs[AnyJob]) -> None:
    """Checks the nodes and prints the results. Raises RunFailed if a node is unfit."""
    from launcher.fleet.node_resources import NodeResources
    from launcher.fleet.nodes import Nodes, address_of
    from launcher.fleet.preflight import Requirements, preflight, raise_problems

    job, world = inputs.job, inputs.world
    console, shown = RunConsole(), Console(highlight=False, soft_wrap=True)
    output_dir = user_path(job.output_dir, "output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    nodes = Nodes(NodeResources.of(world, job.cluster.spare_nodes), console.note)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=output_dir) as folder:
        try:
            nodes.connect(address_of(job.cluster.address))
            nodes.place(job.cluster.wait_seconds)
            level: HealthChecks = "off" if job.cluster.health_checks == "off" else "full"
            required = Requirements(world, inputs.machine.versions, 0, os.environ, job.cluster.env, health_checks=level)
            checks = preflight(nodes.with_spares(), required, RunDir(Path(folder).resolve()))
        finally:
            nodes.end(0.0)
            nodes.close()
    print_full_width(shown, Padding(preflight_table(checks), (0, 0, 1, 0)))
    console.preflight_notes(checks)
    raise_problems(checks)
    console.note("[bold green]all nodes passed[/]")

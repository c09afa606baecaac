"""`launcher node`: one node's task inside a Slurm allocation."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import typer

from launcher.cli.console import RunConsole
from launcher.cli.doctor import examine
from launcher.cli.exec import check_script, script_here, split
from launcher.cli.resume import go_on
from launcher.cli.run import MakePlan, alone_in, plan_and_carry_out
from launcher.errors import Problem, RequestError, first_line
from launcher.fleet.allocation import Allocation, read_allocation, run_stamp
from launcher.job import Job, ScriptJob, placing, read_job, read_script_job
from launcher.plan.model import Script
from launcher.plan.resolve import resolve_world
from launcher.planning import Checked, check_job, check_script_job, make_plan, make_script_plan
from launcher.run_dir import ENDED, RunDir

_ADDRESSES = ("auto", "local")
_DOCTOR = ".doctor"
CONTEXT = {"allow_interspersed_args": False}
"""So that the "--" before a script comes through; options stand before the job file."""


@dataclass(frozen=True)
class _Work:
    """What is to be done: a job's own training, or a script of the user's, as `launcher run` and `exec` would do it."""

    job: Job
    job_file: Path
    overrides: list[str]
    script: Script | None

    def check(self) -> Checked:
        """Raises RequestError for what is wrong before anything is started."""
        if isinstance(self.job, ScriptJob):
            assert self.script is not None
            check_script(self.script)
            return check_script_job(self.job, str(self.job_file))
        return check_job(self.job, str(self.job_file))

    def carry_out(self, checked: Checked, directory: RunDir) -> None:
        make: MakePlan = partial(make_plan, self.job, checked)
        if isinstance(self.job, ScriptJob):
            assert self.script is not None
            make = partial(make_script_plan, self.job, self.script, checked)
        plan_and_carry_out(make, self.job_file, self.overrides, directory)


def node(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file."),
    rest: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]... [-- SCRIPT [ARGUMENT]...]", help="Overrides; a script as for exec."
    ),
    doctor: bool = typer.Option(False, "--doctor", help="Check the allocation's nodes, and train nothing."),
    stop: bool = typer.Option(False, "--stop", help="Ask this allocation's run to save and stop."),
) -> None:
    """Run a job inside a Slurm allocation; started by srun once on every node.

    The nodes bring up a Ray of this job's own. The first one carries out the run, and its exit status is the run's.
    """
    overrides, arguments = split(rest or [])
    read = read_script_job if arguments else read_job
    job = read(job_file, overrides)
    if stop:
        _request_stop(_run_directory(job, job.name, run_stamp(os.environ)))
        return
    with placing(job_file, overrides):
        allocation = read_allocation(os.environ)
        overrides = [*overrides, *_nodes_override(job, allocation)]
    job = read(job_file, overrides)
    work = _Work(job, job_file, overrides, script_here(arguments) if arguments else None)
    if allocation.node != 0:
        _other(work, allocation, _DOCTOR if doctor else job.name)
    elif doctor:
        _examine_first(work, allocation)
    else:
        _first(work, allocation)


def _first(work: _Work, allocation: Allocation) -> None:
    from launcher.fleet.allocated import first_node

    signal.signal(signal.SIGTERM, _interrupt)
    checked = _checked(work, allocation)
    directory, again = _directory(work.job, allocation)
    with alone_in(directory), _end_told(directory):
        directory.enter("placing")
        RunConsole().note(_bringing_up(allocation))
        with first_node(allocation, directory, work.job.cluster.wait_seconds):
            if again:
                go_on(directory, [], RunConsole())
            else:
                work.carry_out(checked, directory)


def _examine_first(work: _Work, allocation: Allocation) -> None:
    from launcher.fleet.allocated import first_node

    signal.signal(signal.SIGTERM, _interrupt)
    job, machine = work.job, _checked(work, allocation).machine
    directory = RunDir.create(Path(job.output_dir).expanduser(), _DOCTOR, allocation.stamp)
    try:
        RunConsole().note(_bringing_up(allocation))
        with first_node(allocation, directory, job.cluster.wait_seconds):
            examine(job, resolve_world(job, machine), machine.versions)
    finally:
        shutil.rmtree(directory.path)


def _checked(work: _Work, allocation: Allocation) -> Checked:
    with placing(work.job_file, work.overrides):
        _check_allocation(work.job, allocation)
        return work.check()


def _bringing_up(allocation: Allocation) -> str:
    hosts = ", ".join(allocation.hosts)
    return f"bringing up a Ray of {allocation.nodes} node{'s' if allocation.nodes > 1 else ''}: {hosts}"


@contextmanager
def _end_told(directory: RunDir) -> Iterator[None]:
    """Writes down the end of a run that came to nothing before its supervisor could."""
    try:
        yield
    except BaseException as error:
        if directory.path.exists() and directory.state().get("state") not in ENDED:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            reason = "interrupted" if stopped else first_line(error)
            directory.enter("stopped" if stopped else "failed", reason=reason, message=str(error))
        raise


def _other(work: _Work, allocation: Allocation, name: str) -> None:
    from launcher.fleet.allocated import other_node

    # What the first node refuses all refuse, and none waits for it.
    _checked(work, allocation)
    # Slurm signals every task at once; this one ends when the first node has saved and gone.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    other_node(allocation, _run_directory(work.job, name, allocation.stamp), work.job.cluster.wait_seconds)


def _request_stop(directory: RunDir) -> None:
    if not directory.path.is_dir():
        raise RequestError(Problem("there is no such run, or not yet", file=str(directory.path)))
    directory.request_stop(now=False)


def _nodes_override(job: Job, allocation: Allocation) -> list[str]:
    """The allocation decides on the number of nodes where the job does not. Raises RequestError where they differ."""
    if "nodes" not in job.cluster.model_fields_set:
        return [f"cluster.nodes={allocation.nodes}"]
    if job.cluster.nodes != allocation.nodes:
        found = f"the job asks for {job.cluster.nodes} nodes, and Slurm gave {allocation.nodes}"
        mend = f"sbatch --nodes={job.cluster.nodes}, or leave cluster.nodes to the allocation"
        raise RequestError(Problem(found, key="cluster.nodes", mend=mend))
    return []


def _check_allocation(job: Job, allocation: Allocation) -> None:
    """Is what the job asks of a node what Slurm gave? Raises RequestError."""
    cluster = job.cluster
    if cluster.address not in _ADDRESSES:
        mend = "leave it out: inside an allocation the launcher starts a Ray of the job's own"
        raise RequestError(Problem(f"found {cluster.address}", key="cluster.address", mend=mend))
    wanted = cluster.gpus_per_node if isinstance(cluster.gpus_per_node, int) else allocation.gpus
    if wanted > allocation.gpus:
        found = f"{wanted} GPUs a node, and Slurm gave {allocation.gpus}"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", mend=f"sbatch --gpus-per-node={wanted}"))
    processes = max(wanted, cluster.processes_per_node if isinstance(cluster.processes_per_node, int) else 1)
    if processes > allocation.cpus:
        found = f"{processes} ranks a node, and Slurm gave {allocation.cpus} processors"
        raise RequestError(Problem(found, key="cluster", mend=f"sbatch --cpus-per-task={processes} or more"))


def _directory(job: Job, allocation: Allocation) -> tuple[RunDir, bool]:
    """The run directory of this allocation, and whether a run that was requeued goes on in it."""
    directory = _run_directory(job, job.name, allocation.stamp)
    if allocation.restart and directory.path.exists():
        if directory.complete_checkpoints():
            return directory, True
        # Nothing was saved before the job was requeued: it begins anew.
        directory.path.rename(directory.path.with_name(f"{directory.path.name}.start-{allocation.restart}"))
    elif directory.path.exists():
        mend = "give each its own name: launcher node JOB.yaml name=…"
        raise RequestError(Problem("this allocation has had a run of this name", file=str(directory.path), mend=mend))
    return RunDir.create(directory.path.parent, job.name, allocation.stamp), False


def _run_directory(job: Job, name: str, stamp: str) -> RunDir:
    return RunDir((Path(job.output_dir).expanduser() / f"{name}-{stamp}").resolve())


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)

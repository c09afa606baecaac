"""`launcher node`: one node's task inside a Slurm allocation."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import typer

from launcher.cli.console import RunConsole
from launcher.cli.doctor import examine
from launcher.cli.exec import check_script, run_again, script_here, split
from launcher.cli.failing import record_failure
from launcher.cli.resume import go_on, planned_run, rest_of, where_to_go_on
from launcher.cli.run import MakePlan, alone_in, interruptible, plan_and_carry_out
from launcher.errors import Problem, RequestError
from launcher.job import Job, ScriptJob, placing, read_job, read_script_job
from launcher.job.read import override_key
from launcher.plan.facts import MachineFacts
from launcher.plan.resolve import resolve_world
from launcher.plan.schema import Script
from launcher.prepare.machine import measure_machine
from launcher.run_dir import ENDED, RunDir
from launcher.runs.planning import Checked, check_job, check_script_job, make_plan, make_script_plan
from launcher.slurm.allocation import Allocation, read_allocation, run_stamp
from launcher.slurm.startup_errors import StartupErrors

_THIS_MACHINE, _OWN_RAY = "local", "cluster.address=auto"
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

    def check(self, machine: MachineFacts) -> Checked:
        """Raises RequestError for what is wrong before anything is started."""
        if isinstance(self.job, ScriptJob):
            assert self.script is not None
            check_script(self.script)
            return check_script_job(self.job, str(self.job_file), machine)
        return check_job(self.job, str(self.job_file), machine)

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
    resume: bool = typer.Option(False, "--resume", help="JOB.YAML is a run directory: go on with that run."),
    doctor: bool = typer.Option(False, "--doctor", help="Check the allocation's nodes, and train nothing."),
    stop: bool = typer.Option(False, "--stop", help="Ask this allocation's run to save and stop."),
) -> None:
    """Run a job inside a Slurm allocation; started by srun once on every node.

    The nodes bring up a Ray of this job's own. The first one carries out the run, and its exit status is the run's.
    """
    overrides, arguments = split(rest or [])
    if resume:
        if doctor or arguments:
            raise RequestError(Problem("--resume goes on with a run, as it was planned: it takes overrides alone"))
        _resume(job_file, overrides, stop)
        return
    read = read_script_job if arguments else read_job
    job = read(job_file, overrides)
    if stop:
        _request_stop(_run_directory(job, job.name, run_stamp(os.environ)))
        return
    with placing(job_file, overrides):
        allocation = read_allocation(os.environ)
    directory = _run_directory(job, _DOCTOR if doctor else job.name, allocation.stamp)
    with _refusing(directory, allocation) as startup_errors:
        overrides = [*overrides, *_settled_by(allocation, job)]
        job = read(job_file, overrides)
        work = _Work(job, job_file, overrides, script_here(arguments) if arguments else None)
        checked = _checked(work, allocation)
        if allocation.node != 0:
            _attend(job, allocation, directory, startup_errors)
        elif doctor:
            _examine_first(work, allocation, startup_errors, checked.machine)
        else:
            _first(work, allocation, startup_errors, checked)


@contextmanager
def _refusing(directory: RunDir, allocation: Allocation) -> Iterator[StartupErrors]:
    """Where a node ends before it has met the others, they are told, and none waits for it."""
    signal.signal(signal.SIGTERM, _interrupt)
    startup_errors = StartupErrors(directory, allocation)
    with startup_errors.reported():
        yield startup_errors


def _first(work: _Work, allocation: Allocation, startup_errors: StartupErrors, checked: Checked) -> None:
    directory, again = _directory(work.job, allocation)
    act = partial(work.carry_out, checked, directory)
    if again:
        act = partial(run_again, directory) if work.script else partial(go_on, directory, [], RunConsole())
    _with_a_ray(work.job, allocation, directory, startup_errors, act)


def _with_a_ray(
    job: Job, allocation: Allocation, directory: RunDir, startup_errors: StartupErrors, act: Callable[[], None]
) -> None:
    """Does what the first node is for, on a Ray of all nodes. It may be cancelled while that is brought up."""
    from launcher.slurm.ray_cluster import first_node

    console = RunConsole()
    with alone_in(directory), _end_told(directory), ExitStack() as listening:
        listening.enter_context(interruptible(console, directory))
        directory.enter("placing")
        console.note(_bringing_up(allocation))
        with first_node(allocation, directory, job.cluster.wait_seconds, startup_errors):
            # Two that listen would take one request for two: from here on `act` does.
            listening.close()
            act()


def _resume(run: Path, overrides: list[str], stop: bool) -> None:
    """Goes on with a run in an allocation that may be another one, of another number of nodes."""
    if stop:
        _request_stop(planned_run(run))
        return
    allocation = read_allocation(os.environ)
    with _refusing(RunDir(run.resolve()), allocation) as startup_errors:
        directory = planned_run(run)
        before = where_to_go_on(directory).plan
        if before.world.nodes != allocation.nodes and not _names(overrides, "nodes"):
            overrides = [*overrides, f"cluster.nodes={allocation.nodes}"]
        if before.job.cluster.address == _THIS_MACHINE and not _names(overrides, "address"):
            overrides = [*overrides, _OWN_RAY]
        rest = rest_of(directory, overrides, RunConsole())
        job = rest.plan.job
        _check_allocation(job, allocation, measure_machine())
        if allocation.node != 0:
            _attend(job, allocation, directory, startup_errors)
            return
        act = partial(go_on, directory, overrides, RunConsole(), rest)
        _with_a_ray(job, allocation, directory, startup_errors, act)


def _examine_first(work: _Work, allocation: Allocation, startup_errors: StartupErrors, machine: MachineFacts) -> None:
    from launcher.slurm.ray_cluster import first_node

    job, output_dir = work.job, Path(work.job.output_dir).expanduser()
    # What a doctor that was killed in this allocation left behind: this one goes by the same name.
    shutil.rmtree(_run_directory(job, _DOCTOR, allocation.stamp).path, ignore_errors=True)
    directory = RunDir.create(output_dir, _DOCTOR, allocation.stamp)
    try:
        RunConsole().note(_bringing_up(allocation))
        with first_node(allocation, directory, job.cluster.wait_seconds, startup_errors):
            examine(job, resolve_world(job, machine), machine.versions)
    finally:
        shutil.rmtree(directory.path)


def _checked(work: _Work, allocation: Allocation) -> Checked:
    with placing(work.job_file, work.overrides):
        machine = measure_machine()
        _check_allocation(work.job, allocation, machine)
        return work.check(machine)


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
            if isinstance(error, KeyboardInterrupt | SystemExit | typer.Exit):
                reason = _stopped_by(directory)
                # A full disk must not hide what ended the run.
                with suppress(OSError):
                    directory.enter("stopped", reason=reason, message=reason)
            else:
                record_failure(directory, error, RunConsole().note)
        raise


def _stopped_by(directory: RunDir) -> str:
    request = directory.stop_request()
    return f"cancelled by {request['by']}" if request else "interrupted"


def _attend(job: Job, allocation: Allocation, directory: RunDir, startup_errors: StartupErrors) -> None:
    """Lends this node to the first one."""
    from launcher.slurm.ray_cluster import other_node

    other_node(allocation, directory, job.cluster.wait_seconds, startup_errors, _leave_the_end_to_the_first)


def _leave_the_end_to_the_first() -> None:
    # Slurm signals every task at once; this one ends when the first node has saved and gone.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)


def _request_stop(directory: RunDir) -> None:
    if not directory.path.is_dir():
        raise RequestError(Problem("there is no such run, or not yet", file=str(directory.path)))
    directory.request_stop(now=False)


def _settled_by(allocation: Allocation, job: Job) -> Iterator[str]:
    """Overrides: the allocation decides on the number of nodes where the job does not, and has a Ray of its own."""
    if "nodes" not in job.cluster.model_fields_set:
        yield f"cluster.nodes={allocation.nodes}"
    if job.cluster.address == _THIS_MACHINE:
        yield _OWN_RAY


def _names(overrides: list[str], key: str) -> bool:
    return any(override_key(each) == ("cluster", key) for each in overrides)


def _check_allocation(job: Job, allocation: Allocation, machine: MachineFacts) -> None:
    """Is what the job asks of a node what Slurm gave, and is that seen on this one? Raises RequestError."""
    cluster = job.cluster
    if allocation.nodes != cluster.nodes:
        found = f"the job asks for {cluster.nodes} nodes, and Slurm gave {allocation.nodes}"
        hint = f"sbatch --nodes={cluster.nodes}, or leave cluster.nodes to the allocation"
        raise RequestError(Problem(found, key="cluster.nodes", hint=hint))
    if cluster.address != "auto":
        hint = "leave it out: inside an allocation the launcher starts a Ray of the job's own"
        raise RequestError(Problem(f"found {cluster.address}", key="cluster.address", hint=hint))
    if cluster.gpus_per_node == "auto" and machine.gpus != allocation.gpus:
        found = f"auto: Slurm gave {allocation.gpus} GPUs of this node, and {machine.gpus} are seen on it"
        ask = f"sbatch --gpus-per-node={machine.gpus}" if machine.gpus else "see that nvidia-smi works there"
        hint = f"{ask}, or set it to 0 for processors"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", hint=hint))
    wanted = cluster.gpus_per_node if isinstance(cluster.gpus_per_node, int) else allocation.gpus
    if wanted > allocation.gpus:
        found = f"{wanted} GPUs a node, and Slurm gave {allocation.gpus}"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", hint=f"sbatch --gpus-per-node={wanted}"))
    processes = max(wanted, cluster.processes_per_node if isinstance(cluster.processes_per_node, int) else 1)
    if processes > allocation.cpus:
        found = f"{processes} ranks a node, and Slurm gave {allocation.cpus} processors"
        raise RequestError(Problem(found, key="cluster", hint=f"sbatch --cpus-per-task={processes} or more"))


def _directory(job: Job, allocation: Allocation) -> tuple[RunDir, bool]:
    """The run directory of this allocation, and whether a run that was requeued goes on in it.

    What a script has saved there only the script knows: its directory is kept once it may have been started.
    """
    directory = _run_directory(job, job.name, allocation.stamp)
    if allocation.restart and directory.path.exists():
        started = directory.ds_config_file.is_file() if isinstance(job, ScriptJob) else directory.complete_checkpoints()
        if started:
            return directory, True
        # Nothing was saved before the job was requeued: it begins anew.
        directory.path.rename(directory.path.with_name(f"{directory.path.name}.start-{allocation.restart}"))
    elif directory.path.exists():
        hint = "give each its own name: launcher node JOB.yaml name=…"
        raise RequestError(Problem("this allocation has had a run of this name", file=str(directory.path), hint=hint))
    return RunDir.create(directory.path.parent, job.name, allocation.stamp), False


def _run_directory(job: Job, name: str, stamp: str) -> RunDir:
    return RunDir((Path(job.output_dir).expanduser() / f"{name}-{stamp}").resolve())


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)

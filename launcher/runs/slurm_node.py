"""The task of one node in a Slurm allocation: the nodes form a Ray cluster, and the first node supervises the run."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from launcher.errors import FailureCode, Problem, RequestError, RunFailed
from launcher.files import use_output_mode
from launcher.job import AnyJob, LoadedJob, ScriptJob, load_job
from launcher.job.load import sets_key
from launcher.job.user_path import user_path
from launcher.plan.facts import MachineFacts
from launcher.plan.schema import Plan
from launcher.prepare.machine import measure_machine
from launcher.run_dir import ENDED, RunDir, write_json
from launcher.runs.console import RunConsole
from launcher.runs.continuation import Continuation, check_resubmit, newest_update
from launcher.runs.doctor import examine
from launcher.runs.failure_record import record_failure
from launcher.runs.interrupts import STOP_SIGNALS, WARNINGS, Interrupted, interruptible, request_reason, stop_reason
from launcher.runs.outcome import RunResult
from launcher.runs.planning import CheckedJob, check_job
from launcher.runs.remote import check_upload
from launcher.runs.rest import planned_run, rest_as_planned, rest_of
from launcher.runs.resume import resume_locked
from launcher.runs.run import run_checked
from launcher.runs.run_lock import only_launcher_of
from launcher.runs.script import check_script, run_script_again
from launcher.runs.slurm_requests import run_directory
from launcher.slurm.allocation import Allocation, nodes_and_spares, read_allocation
from launcher.slurm.continuation import DEFAULT_MAX_JOBS, continues_by_itself
from launcher.slurm.options import may_lose_nodes
from launcher.slurm.queue import cancel_slurm_job, requeue_slurm_job
from launcher.slurm.requeue import excluded_of, requeue_without
from launcher.slurm.startup_errors import StartupErrors

_THIS_MACHINE, _OWN_RAY = "local", "cluster.address=auto"
_DOCTOR = ".doctor"


def run_on_node(job_file: Path, overrides: Sequence[str], command: Sequence[str] | None) -> int:
    """Runs the part of a job that falls to this node of the allocation. Returns the exit status; raises as `run` does.

    The first node supervises the run on a Ray cluster of all nodes; the other nodes join that cluster.
    """
    job, allocation = _job_and_allocation(job_file, overrides, command)
    with _reporting_errors(run_directory(job, job.name, allocation.stamp), allocation) as errors:
        checked = _checked(_in_allocation(job_file, overrides, command, allocation, job), allocation)
        job = checked.loaded.job
        if allocation.node != 0:
            return _join_first_node(job, allocation, run_directory(job, job.name, allocation.stamp), errors)
        with checked.loaded.locate_errors():
            check_resubmit(job)
        directory, requeued = _directory(job, allocation)
        _check_excluded(job, allocation, directory)
        console, on_stop = RunConsole(), _continuation(job, directory, allocation, newest_update(directory))
        act = partial(run_checked, checked, directory, console, on_stop=on_stop)
        if requeued and isinstance(job, ScriptJob):
            act = partial(run_script_again, directory)
        elif requeued:
            act = partial(resume_locked, directory, [], console, requeued=True, on_stop=on_stop)
        return _on_ray_cluster(job, allocation, directory, errors, act)


def resume_on_node(run: Path, overrides: list[str]) -> int:
    """Resumes a run, possibly on another number of nodes than before. Returns and raises as `run_on_node`."""
    allocation = read_allocation(os.environ)
    with _reporting_errors(RunDir(run.resolve()), allocation) as errors:
        directory = planned_run(run)
        before = rest_as_planned(directory).plan
        use_output_mode(before.job.output_mode)
        overrides = [*overrides, *_nodes_of_resume(before, overrides, allocation)]
        if before.job.cluster.address == _THIS_MACHINE and not sets_key(overrides, "cluster", "address"):
            overrides = [*overrides, _OWN_RAY]
        # The other nodes only need the job.
        rest = rest_of(directory, overrides, RunConsole(), verify=allocation.node == 0)
        job = rest.plan.job
        _check_allocation(job, allocation, measure_machine())
        if allocation.node != 0:
            return _join_first_node(job, allocation, directory, errors)
        _check_excluded(job, allocation, directory)
        check_resubmit(job)
        on_stop = _continuation(job, directory, allocation, rest.start.update)
        # Nobody is there who could correct an upload that does not work at the moment.
        requeued = continues_by_itself(directory, os.environ["SLURM_JOB_ID"])
        act = partial(resume_locked, directory, overrides, RunConsole(), rest, requeued=requeued, on_stop=on_stop)
        return _on_ray_cluster(job, allocation, directory, errors, act)


def examine_on_node(job_file: Path, overrides: Sequence[str], command: Sequence[str] | None) -> int:
    """Checks the nodes of the allocation as `launcher doctor` does. Returns and raises as `run_on_node`."""
    from launcher.slurm.ray_cluster import first_node

    job, allocation = _job_and_allocation(job_file, overrides, command)
    path = run_directory(job, _DOCTOR, allocation.stamp)
    with _reporting_errors(path, allocation) as errors:
        checked = _checked(_in_allocation(job_file, overrides, command, allocation, job), allocation)
        job = checked.loaded.job
        if allocation.node != 0:
            return _join_first_node(job, allocation, path, errors)
        # Left behind if an earlier check in this allocation was killed.
        shutil.rmtree(path.path, ignore_errors=True)
        directory = RunDir.create(user_path(job.output_dir, "output_dir"), _DOCTOR, allocation.stamp)
        try:
            RunConsole().note(_starting_ray(allocation))
            with first_node(allocation, directory, job.cluster.wait_seconds, errors):
                examine(checked.inputs)
        finally:
            shutil.rmtree(directory.path)
        return 0


def _continuation(job: AnyJob, directory: RunDir, allocation: Allocation, begun: int) -> Continuation | None:
    """What submits the next job when the time limit stops the run; None if the job does not ask for it.

    `begun` is the update at which the run starts in this job.
    """
    if not job.slurm.resubmit:
        return None
    return Continuation(
        directory=directory,
        console=RunConsole(),
        job_id=os.environ["SLURM_JOB_ID"],
        nodes=allocation.nodes,
        # Before Ray starts, which sets variables of its own.
        environment=dict(os.environ),
        begun=begun,
        max_jobs=job.slurm.max_jobs or DEFAULT_MAX_JOBS,
    )


def _job_and_allocation(
    job_file: Path, overrides: Sequence[str], command: Sequence[str] | None
) -> tuple[AnyJob, Allocation]:
    loaded = load_job(job_file, *overrides, command=command)
    use_output_mode(loaded.job.output_mode)
    with loaded.locate_errors():
        return loaded.job, read_allocation(os.environ)


def _in_allocation(
    job_file: Path, overrides: Sequence[str], command: Sequence[str] | None, allocation: Allocation, job: AnyJob
) -> LoadedJob:
    """The job with the number of nodes of the allocation, unless the job sets it, and a Ray cluster of its own."""
    return load_job(job_file, *overrides, *_allocation_overrides(allocation, job), command=command)


@contextmanager
def _reporting_errors(directory: RunDir, allocation: Allocation) -> Iterator[StartupErrors]:
    """Reports an error of this node to nodes that are still waiting for it."""
    for number in (signal.SIGTERM, *WARNINGS):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    errors = StartupErrors(directory, allocation)
    with errors.reported():
        yield errors


def _on_ray_cluster(
    job: AnyJob, allocation: Allocation, directory: RunDir, errors: StartupErrors, act: Callable[[], RunResult]
) -> int:
    """Calls `act` on a Ray cluster of all nodes. The run can be cancelled while that cluster starts."""
    from launcher.slurm.ray_cluster import first_node

    console = RunConsole()
    lost: list[str] | None = [] if may_lose_nodes(job) else None
    with _ending_step(allocation, lost), only_launcher_of(directory), _end_recorded(directory), ExitStack() as startup:
        startup.enter_context(interruptible(console, directory))
        directory.enter("placing")
        console.note(_starting_ray(allocation))
        with first_node(allocation, directory, job.cluster.wait_seconds, errors, lost):
            # From here on `act` reads requests to stop; two readers would handle the same request twice.
            startup.close()
            try:
                return act().exit_status
            finally:
                # The run has ended: a warning of the time limit must not interrupt the end of Ray.
                for number in WARNINGS:
                    signal.signal(number, signal.SIG_IGN)


@contextmanager
def _ending_step(allocation: Allocation, lost: Sequence[str] | None) -> Iterator[None]:
    """Ends this task's step after the block if nodes are lost: srun would wait for them until Slurm counts them so."""
    try:
        yield
    finally:
        if lost:
            RunConsole().note(f"{', '.join(lost)} did not end: cancelling step {allocation.job_id}.{allocation.step}")
            # In a container scancel may be missing.
            with suppress(RunFailed):
                cancel_slurm_job(f"{allocation.job_id}.{allocation.step}")


def _checked(loaded: LoadedJob, allocation: Allocation) -> CheckedJob:
    machine = measure_machine()
    with loaded.locate_errors():
        _check_allocation(loaded.job, allocation, machine)
        if isinstance(loaded.job, ScriptJob):
            check_script(loaded.job)
    checked = check_job(loaded, machine)
    if allocation.node == 0 and not allocation.restart:
        with loaded.locate_errors():
            check_upload(loaded.job)
    return checked


def _starting_ray(allocation: Allocation) -> str:
    hosts = ", ".join(allocation.hosts)
    return f"starting a Ray cluster of {allocation.nodes} node{'s' if allocation.nodes > 1 else ''}: {hosts}"


@contextmanager
def _end_recorded(directory: RunDir) -> Iterator[None]:
    """Records the end of a run that ends before its supervisor can record it."""
    try:
        yield
    except BaseException as error:
        if directory.path.exists() and directory.state().get("state") not in ENDED:
            if isinstance(error, KeyboardInterrupt | SystemExit | Interrupted):
                reason = _stopped_by(directory, error)
                # A full disk must not hide the original error.
                with suppress(OSError):
                    directory.enter("stopped", reason=reason, message=reason)
            else:
                record_failure(directory, error, RunConsole().note)
        raise


def _stopped_by(directory: RunDir, error: BaseException) -> str:
    if request := directory.stop_request():
        return request_reason(request)
    status = error.exit_status if isinstance(error, Interrupted) else getattr(error, "code", None)
    return stop_reason(status - 128) if isinstance(status, int) and status > 128 else "interrupted"


def _join_first_node(job: AnyJob, allocation: Allocation, directory: RunDir, errors: StartupErrors) -> int:
    """Joins the Ray cluster of the first node until the run ends."""
    from launcher.slurm.ray_cluster import FirstNodeLost, other_node

    try:
        other_node(
            allocation,
            directory,
            job.cluster.wait_seconds,
            errors,
            _ignore_stop_signals,
            may_lose_nodes=may_lose_nodes(job),
        )
    except FirstNodeLost as error:
        if error.acts:
            _requeue(allocation.job_id)
        raise
    return 0


def _requeue(job_id: str) -> None:
    """Queues the job again, or ends it if that is not allowed: nothing else would end it before its time limit."""
    console = RunConsole()
    try:
        requeue_slurm_job(job_id)
        console.note(f"queued job {job_id} again")
    except RunFailed as error:
        console.note(f"cancelling job {job_id}: {error}")
        cancel_slurm_job(job_id)


def _ignore_stop_signals() -> None:
    # Slurm signals every task at once; this task ends after the first node has saved and stopped.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda _number, _frame: None)


def _nodes_of_resume(before: Plan, overrides: Sequence[str], allocation: Allocation) -> list[str]:
    """Overrides for the number of nodes if the allocation has another one than the run, spare nodes included."""
    if sets_key(overrides, "cluster", "nodes") or sets_key(overrides, "cluster", "spare_nodes"):
        return []
    nodes, spares = nodes_and_spares(allocation.nodes, before.job.cluster.nodes, before.job.cluster.spare_nodes)
    changed = [f"cluster.spare_nodes={spares}"] if spares != before.job.cluster.spare_nodes else []
    return [f"cluster.nodes={nodes}", *changed] if nodes != before.world.nodes else changed


def _allocation_overrides(allocation: Allocation, job: AnyJob) -> Iterator[str]:
    """Overrides for the number of nodes and the Ray address, if the job does not set them."""
    if "nodes" not in job.cluster.model_fields_set:
        yield f"cluster.nodes={max(1, allocation.nodes - job.cluster.spare_nodes)}"
    if job.cluster.address == _THIS_MACHINE:
        yield _OWN_RAY


def _check_allocation(job: AnyJob, allocation: Allocation, machine: MachineFacts) -> None:
    """Raises RequestError if the job does not match the allocation, or if GPUs of this node are not visible."""
    cluster = job.cluster
    if allocation.nodes != cluster.all_nodes:
        spare = f" and {cluster.spare_nodes} spare nodes" if cluster.spare_nodes else ""
        found = f"the job asks for {cluster.nodes} nodes{spare}, but Slurm allocated {allocation.nodes}"
        hint = f"sbatch --nodes={cluster.all_nodes}, or leave out cluster.nodes"
        raise RequestError(Problem(found, key="cluster.nodes", hint=hint))
    if cluster.address != "auto":
        hint = "leave it out: in an allocation the launcher starts its own Ray cluster"
        raise RequestError(Problem(f"found {cluster.address}", key="cluster.address", hint=hint))
    if cluster.gpus_per_node == "auto" and machine.gpus != allocation.gpus:
        found = f"Slurm allocated {allocation.gpus} GPUs on this node, but {machine.gpus} are visible"
        fix = f"sbatch --gpus-per-node={machine.gpus}" if machine.gpus else "make nvidia-smi work on this node"
        hint = f"{fix}, or set it to 0 to train on CPUs"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", hint=hint))
    gpus = cluster.gpus_per_node if isinstance(cluster.gpus_per_node, int) else allocation.gpus
    if gpus > allocation.gpus:
        found = f"the job asks for {gpus} GPUs per node, but Slurm allocated {allocation.gpus}"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", hint=f"sbatch --gpus-per-node={gpus}"))
    processes = max(gpus, cluster.processes_per_node if isinstance(cluster.processes_per_node, int) else 1)
    if processes > allocation.cpus:
        found = f"the job has {processes} ranks per node, but Slurm allocated {allocation.cpus} CPUs"
        raise RequestError(Problem(found, key="cluster", hint=f"sbatch --cpus-per-task={processes} or more"))


def _check_excluded(job: AnyJob, allocation: Allocation, directory: RunDir) -> None:
    """Requeues the job without the nodes that are excluded from the run, if it has too few others.

    Raises RunFailed if Slurm does not requeue it.
    """
    excluded = excluded_of(allocation.hosts, directory.excluded_nodes()) if job.cluster.exclude_after else []
    if not excluded or allocation.nodes - len(excluded) >= job.cluster.nodes:
        return
    names = ", ".join(excluded)
    RunConsole().note(f"requeuing the Slurm job without {names}, excluded from this run because of earlier failures")
    refused = requeue_without(os.environ["SLURM_JOB_ID"], excluded)
    if refused is None:
        # Slurm ends this process.
        raise Interrupted(signal.SIGTERM)
    hint = f"submit it again with --exclude={','.join(excluded)}, or use these nodes again with cluster.exclude_after=0"
    message = (
        f"{names} excluded from this run because of earlier failures, and Slurm does not requeue the job: {refused}"
    )
    raise RunFailed(f"{message.strip()}\n  {hint}", code=FailureCode.NOT_ENOUGH_NODES)


def _directory(job: AnyJob, allocation: Allocation) -> tuple[RunDir, bool]:
    """The run directory of this allocation, and whether a requeued run continues in it.

    A script saves its own files there: its directory is kept if the script may have started.
    """
    directory = run_directory(job, job.name, allocation.stamp)
    node_failures = directory.node_failures()
    if allocation.restart and directory.path.exists():
        started = directory.ds_config_file.is_file() if isinstance(job, ScriptJob) else directory.complete_checkpoints()
        if started:
            return directory, True
        # No checkpoint was saved before the job was requeued: it starts from scratch.
        directory.path.rename(directory.path.with_name(f"{directory.path.name}.start-{allocation.restart}"))
    elif directory.path.exists():
        hint = "give each run its own name: launcher node JOB.yaml name=…"
        raise RequestError(
            Problem("this allocation already has a run of this name", file=str(directory.path), hint=hint)
        )
    created = RunDir.create(directory.path.parent, job.name, allocation.stamp, job.output_mode)
    if node_failures:
        write_json(created.node_failures_file, node_failures)
    return created, False


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)

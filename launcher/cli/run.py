"""`launcher run`: carry out a job file."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from launcher.cli.console import RunConsole
from launcher.errors import LauncherError, Problem, RequestError
from launcher.job import Job, placing, read_job
from launcher.plan.facts import MachineFacts
from launcher.plan.model import Plan
from launcher.plan.resume import Start
from launcher.planning import check_job, make_plan
from launcher.run_dir import RunDir, write_atomic, write_json

if TYPE_CHECKING:
    from launcher.fleet.supervisor import Outcome, Supervisor


def run(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file."),
    overrides: list[str] = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values set over the file's."),
) -> None:
    """Plan a job and carry it out: place the nodes, start the ranks, train, save, export."""
    job = read_job(job_file, overrides or ())
    with placing(job_file, overrides or ()):
        _, machine = check_job(job, str(job_file))
        check_reach(job, machine)
    directory = RunDir.create(Path(job.output_dir).expanduser(), job.name)
    console = RunConsole()
    with console.closing(), placing(job_file, overrides or ()):
        plan = _planned(job, job_file, overrides or [], directory, console)
        carry_out(plan, directory.plan_file, directory, console, start=None)


def check_reach(job: Job, machine: MachineFacts) -> None:
    """A Ray of our own is this one machine. Raises RequestError where the job asks for more than it has."""
    from launcher.fleet.nodes import address_of

    cluster = job.cluster
    if address_of(cluster.address) != "local":
        return
    mend = "give the address of a Ray cluster in cluster.address or RAY_ADDRESS"
    if cluster.nodes > 1:
        raise RequestError(
            Problem(f"{cluster.nodes} nodes, and there is this machine alone", key="cluster.nodes", mend=mend)
        )
    if cluster.gpus_per_node != "auto" and cluster.gpus_per_node > machine.gpus:
        found = f"{cluster.gpus_per_node} GPUs a node, and this machine has {machine.gpus}"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", mend=mend))


def carry_out(plan: Plan, plan_file: Path, directory: RunDir, console: RunConsole, start: Start | None) -> None:
    """Runs the plan that stands in `plan_file` and shows how it ends. Raises what went wrong."""
    from launcher.fleet.supervisor import Supervisor

    console.total = plan.length.total_updates
    supervisor = Supervisor(plan, plan_file, directory, console)
    try:
        with _interrupts(supervisor, console):
            outcome = supervisor.run(start)
    except KeyboardInterrupt:
        directory.enter("stopped", reason="interrupted")
        console.note(f"stopped at once. {_how_to_go_on(directory)}")
        raise
    except LauncherError as error:
        directory.enter("failed", reason=str(error).splitlines()[0])
        raise
    except BaseException as error:
        directory.enter("failed", reason=repr(error))
        raise
    directory.enter(outcome.state, update=outcome.updates, reason=outcome.reason)
    _summarise(plan, directory, console, outcome)
    if outcome.state == "stopped":
        # As a shell says it of a command that a signal ended: what waits for a finished run must not go on.
        raise typer.Exit(1 if outcome.reason else 128 + supervisor.stop_signal)


def _planned(job: Job, job_file: Path, overrides: list[str], directory: RunDir, console: RunConsole) -> Plan:
    """The plan, written to the run directory; a job that turns out bad leaves no directory behind."""
    try:
        directory.enter("planning")
        console.state("planning")
        if overrides:
            directory.event("overrides", values=overrides)
        write_atomic(directory.job_file, job_file.read_bytes())
        with (directory.logs / "prepare.log").open("wb") as log:
            plan = make_plan(job, str(job_file), _Preparing(directory, console), log)
        write_plan(plan, directory)
    except (RequestError, KeyboardInterrupt):
        shutil.rmtree(directory.path)
        raise
    except BaseException as error:
        directory.enter("failed", reason=str(error).splitlines()[0] if str(error) else repr(error))
        raise
    for warning in plan.warnings:
        console.note(f"          [yellow]note:[/] {warning}")
    return plan


def write_plan(plan: Plan, directory: RunDir) -> None:
    """Writes plan.json and ds_config.json."""
    write_atomic(directory.plan_file, plan.to_json())
    write_json(directory.ds_config_file, plan.ds_config)
    directory.event("plan", sha256=plan.sha256, updates=plan.length.total_updates)


class _Preparing:
    """Enters the state of preparing with the first that is not cached."""

    def __init__(self, directory: RunDir, console: RunConsole) -> None:
        self._directory, self._console, self._entered = directory, console, False

    def __call__(self, progress: dict[str, object]) -> None:
        if not self._entered:
            self._entered = True
            self._directory.enter("preparing")
            self._console.state("preparing")
        self._console.prepare(progress)


@contextmanager
def _interrupts(supervisor: Supervisor, console: RunConsole) -> Iterator[None]:
    """Ctrl-C or SIGTERM once: stop after the update and save. Again, or before training: stop now."""

    def handle(number: int, _frame: FrameType | None) -> None:
        if supervisor.stopping or not supervisor.request_stop(number):
            raise KeyboardInterrupt
        console.note(f"{signal.Signals(number).name}: stopping after this update, then saving (once more: stop now)")

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summarise(plan: Plan, directory: RunDir, console: RunConsole, outcome: Outcome) -> None:
    evaluations = directory.evaluations()
    console.end_progress()
    if outcome.state == "stopped":
        console.note(f"[bold yellow]stopped[/] after update {outcome.updates} of {plan.length.total_updates}, saved")
        if outcome.reason:
            console.note(f"  because of       {outcome.reason}")
    else:
        console.note(f"[bold green]finished[/] after {outcome.updates} updates")
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        console.note(f"  evaluation loss  {first['loss']:.4f} before, {last['loss']:.4f} after")
    console.note(f"  run directory    {directory.path}")
    if outcome.state == "stopped":
        console.note(f"  {_how_to_go_on(directory)}")
    elif plan.job.export:
        console.note(f"  exported model   {directory.export}")
        console.note("  load it with     AutoModelForCausalLM.from_pretrained(<exported model>)")


def _how_to_go_on(directory: RunDir) -> str:
    if directory.complete_checkpoints():
        return f"go on with: launcher resume {directory.path}"
    return "no checkpoint was saved, so the run begins anew with launcher run"

"""`launcher run`: carry out a job file."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import typer
from rich.markup import escape

from launcher.cli.console import RunConsole, number_text
from launcher.cli.failing import record_failure
from launcher.errors import Problem, RequestError, RunFailed, code_of
from launcher.job import Job, placing, read_job
from launcher.job.schema import ClusterSection
from launcher.lock import STALE_SECONDS
from launcher.plan.facts import MachineFacts
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, ScriptPlan
from launcher.run_dir import RunDir, write_atomic, write_json
from launcher.runs.planning import OnProgress, check_job, make_plan

if TYPE_CHECKING:
    from launcher.runs.supervisor import Outcome, Supervisor

MakePlan = Callable[[OnProgress, IO[bytes]], Plan]
_REQUEST_SECONDS = 1.0


def run(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file."),
    overrides: list[str] = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values set over the file's."),
) -> None:
    """Plan a job and carry it out: place the nodes, start the ranks, train, save, export."""
    job = read_job(job_file, overrides or ())
    with placing(job_file, overrides or ()):
        checked = check_job(job, str(job_file))
        check_reach(job, checked.machine)
    directory = RunDir.create(Path(job.output_dir).expanduser(), job.name)
    with alone_in(directory):
        plan_and_carry_out(partial(make_plan, job, checked), job_file, overrides or [], directory)


def plan_and_carry_out(make: MakePlan, job_file: Path, overrides: list[str], directory: RunDir) -> None:
    """Carries out the plan that `make` makes, in a new run directory that the caller holds. Raises what went wrong."""
    console = RunConsole()
    with (
        console.closing(),
        placing(job_file, overrides),
        interruptible(console, directory) as interrupts,
    ):
        plan = _planned(make, job_file, overrides, directory, console)
        carry_out(plan, directory.plan_file, directory, console, None, interrupts)


@contextmanager
def alone_in(directory: RunDir) -> Iterator[None]:
    """Holds a run directory: two launchers in one would undo each other. Raises RequestError if one is at work."""
    with directory.held() as held:
        if not held:
            raise RequestError(_held_by_another(directory))
        # What was asked of an earlier launcher here is not asked of this one.
        directory.stop_file.unlink(missing_ok=True)
        yield


def _held_by_another(directory: RunDir) -> Problem:
    state, holder = directory.state(), directory.holder()
    who = str(holder) if holder else f"process {state.get('pid')} on {state.get('host')}"
    hint = "wait for its end, or stop it with launcher cancel"
    if holder and holder.host != socket.gethostname():
        hint += f"; if that host is down, the run is free {STALE_SECONDS:.0f} s after the launcher's last heartbeat"
    return Problem(f"another launcher holds this run: {state.get('state')}, {who}", file=str(directory.path), hint=hint)


def check_reach(job: Job, machine: MachineFacts) -> None:
    """Can the nodes that the job asks for be had from here? Raises RequestError."""
    from launcher.fleet.nodes import address_of

    cluster, address = job.cluster, address_of(job.cluster.address)
    if address == "local":
        _check_this_machine(cluster, machine)
    elif address.startswith(("http://", "https://")):
        raise RequestError(
            Problem(
                f"{address} is the address of Ray's dashboard",
                key="cluster.address",
                hint="give that of its head, host:6379, or unset RAY_ADDRESS",
            )
        )
    elif cluster.gpus_per_node == "auto" and not machine.gpus:
        raise RequestError(
            Problem(
                f"the nodes of the Ray at {address} are not seen from here, and this machine has no GPU to go by",
                key="cluster.gpus_per_node",
                hint="say how many GPUs a node has; 0 trains on processors",
            )
        )
    if "runtime_resources/working_dir" in str(Path.cwd()) and not Path(job.output_dir).expanduser().is_absolute():
        raise RequestError(
            Problem(
                f"{job.output_dir} would lie in the working directory of a Ray job, which Ray removes at its end",
                key="output_dir",
                hint="give an absolute path on storage that all nodes see",
            )
        )


def _check_this_machine(cluster: ClusterSection, machine: MachineFacts) -> None:
    hint = "give the address of a Ray cluster in cluster.address or RAY_ADDRESS"
    if cluster.nodes > 1:
        found = f"{cluster.nodes} nodes, and there is this machine alone"
        raise RequestError(Problem(found, key="cluster.nodes", hint=hint))
    if cluster.gpus_per_node != "auto" and cluster.gpus_per_node > machine.gpus:
        found = f"{cluster.gpus_per_node} GPUs a node, and this machine has {machine.gpus}"
        raise RequestError(Problem(found, key="cluster.gpus_per_node", hint=hint))


def carry_out(
    plan: Plan, plan_file: Path, directory: RunDir, console: RunConsole, start: Start | None, interrupts: Interrupts
) -> None:
    """Runs the plan that stands in `plan_file` and shows how it ends. Raises what went wrong."""
    console.total = plan.length.total_updates
    supervisor = interrupts.supervisor = _supervisor(plan, plan_file, directory, console)
    try:
        outcome = supervisor.run(start)
    except KeyboardInterrupt:
        with suppress(OSError):
            directory.enter("stopped", reason=interrupts.reason)
        console.note(f"stopped at once. {_how_to_go_on(plan, directory)}")
        raise
    except (RunFailed, OSError) as error:
        from launcher.watch.why import failed_message

        message, code = failed_message(directory, str(error), code_of(error))
        record_failure(directory, error, console.note, code)
        raise RunFailed(message, code=code) from None
    except BaseException as error:
        record_failure(directory, error, console.note)
        raise
    directory.enter(outcome.state, update=outcome.updates, reason=outcome.reason, code=outcome.code)
    _summarise(plan, directory, console, outcome)
    if outcome.state == "stopped":
        # As a shell says it of a command that a signal ended: what waits for a finished run must not go on.
        raise typer.Exit(1 if outcome.reason else 128 + supervisor.stop_signal)


def _supervisor(plan: Plan, plan_file: Path, directory: RunDir, console: RunConsole) -> Supervisor:
    if isinstance(plan, ScriptPlan):
        from launcher.runs.script_supervisor import ScriptSupervisor

        return ScriptSupervisor(plan, plan_file, directory, console)
    from launcher.runs.supervisor import Supervisor

    return Supervisor(plan, plan_file, directory, console)


def _planned(make: MakePlan, job_file: Path, overrides: list[str], directory: RunDir, console: RunConsole) -> Plan:
    """The plan, written to the run directory; a job that turns out bad leaves no directory behind."""
    try:
        directory.enter("planning")
        console.state("planning")
        if overrides:
            directory.event({"event": "overrides", "values": overrides})
        write_atomic(directory.job_file, job_file.read_bytes())
        with (directory.logs / "prepare.log").open("wb") as log:
            plan = make(_Preparing(directory, console), log)
        write_plan(plan, directory)
    except (RequestError, KeyboardInterrupt):
        # Open files, the lock among them, may keep their folder on a network file system.
        shutil.rmtree(directory.path, ignore_errors=True)
        raise
    except BaseException as error:
        record_failure(directory, error, console.note)
        raise
    for warning in plan.warnings:
        console.note(f"          [yellow]note:[/] {escape(warning)}")
    return plan


def write_plan(plan: Plan, directory: RunDir) -> None:
    """Writes plan.json and ds_config.json."""
    write_atomic(directory.plan_file, plan.to_json())
    write_json(directory.ds_config_file, plan.ds_config)
    directory.event({"event": "plan", "sha256": plan.sha256, "updates": plan.length.total_updates})


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


class Interrupts:
    """Ctrl-C or SIGTERM: the first stops a run after its update and saves; a second, or an early one, stops it now."""

    def __init__(self, console: RunConsole) -> None:
        self._console = console
        self.supervisor: Supervisor | None = None
        self.signal = 0
        self.reason = "interrupted"
        self._at_once = False

    def cancel(self, request: dict[str, Any]) -> None:
        """Takes a request of `launcher cancel`, from another thread: a SIGTERM from elsewhere."""
        self.reason = f"cancelled by {request['by']}"
        self._at_once = request["now"]
        self._console.note(f"          {escape(self.reason)}{', at once' if request['now'] else ''}")
        os.kill(os.getpid(), signal.SIGTERM)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        supervisor = self.supervisor
        if self._at_once or supervisor is None or supervisor.stopping or not supervisor.request_stop(number):
            raise KeyboardInterrupt
        ending = supervisor.phase == "exporting"
        what = "the run is at its end" if ending else supervisor.stops_by
        self._console.note(f"{signal.Signals(number).name}: {what} (once more: stop now)")


@contextmanager
def interruptible(console: RunConsole, directory: RunDir) -> Iterator[Interrupts]:
    """Handles signals, and requests to stop, inside the block.

    A run stopped at once exits with 128 + the signal's number.
    """
    interrupts = Interrupts(console)
    left = threading.Event()
    threading.Thread(target=_await_request, args=(directory, interrupts, left), daemon=True).start()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.signal(number, interrupts.handle) for number in numbers}
    try:
        yield interrupts
    except KeyboardInterrupt:
        raise typer.Exit(128 + (interrupts.signal or signal.SIGINT)) from None
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _await_request(directory: RunDir, interrupts: Interrupts, left: threading.Event) -> None:
    """Passes on what `launcher cancel` asks for, until the run is left. A second request may be for the end at once."""
    heard: dict[str, Any] | None = None
    while not left.wait(_REQUEST_SECONDS):
        request = directory.stop_request()
        if request and request != heard:
            heard = request
            with suppress(OSError):
                directory.event({"event": "stop_requested", "now": request["now"], "by": request["by"]})
            interrupts.cancel(request)


def _summarise(plan: Plan, directory: RunDir, console: RunConsole, outcome: Outcome) -> None:
    evaluations = directory.evaluations()
    console.end_progress()
    if outcome.state == "stopped":
        console.note(f"[bold yellow]stopped[/]{_how_far(plan, outcome)}")
        if outcome.reason:
            console.note(f"  because of       {outcome.reason}")
    else:
        console.note(f"[bold green]finished[/]{_how_far(plan, outcome)}")
    if len(evaluations) > 1:
        first, last = (number_text(evaluations[place].get("loss")) for place in (0, -1))
        console.note(f"  evaluation loss  {first} before, {last} after")
    note_damaged_lines(directory, console)
    console.note(f"  run directory    {directory.path}")
    if outcome.state == "stopped":
        lower = f" schedule.peak_lr={plan.learning_rate.peak_lr / 2:g}" if outcome.reason else ""
        console.note(f"  {_how_to_go_on(plan, directory)}{lower}")
    elif plan.job.export and not isinstance(plan, ScriptPlan):
        console.note(f"  exported model   {directory.export}")
        console.note("  load it with     AutoModelForCausalLM.from_pretrained(<exported model>)")


def note_damaged_lines(directory: RunDir, console: RunConsole) -> None:
    """Reports the lines of the run's files that cannot be read, if there are any."""
    for name, count in directory.damaged_lines().items():
        lines = "1 damaged line, which is" if count == 1 else f"{count} damaged lines, which are"
        console.note(f"  [yellow]note:[/] {name} has {lines} skipped (a full disk or a crash leaves such lines)")


def _how_far(plan: Plan, outcome: Outcome) -> str:
    """How many updates were made, as far as that is known."""
    if outcome.updates is None:
        return ""
    if outcome.state == "finished":
        return f" after {outcome.updates} updates"
    saved = "" if isinstance(plan, ScriptPlan) else ", saved"
    return f" after update {outcome.updates} of {plan.length.total_updates}{saved}"


def _resume_command(plan: Plan, directory: RunDir) -> str:
    """A run that began inside a Slurm allocation needs another one."""
    if "-slurm-" not in directory.path.name:
        return "launcher resume"
    return "launcher submit --resume" if "slurm" in plan.job.model_fields_set else "sbatch SCRIPT --resume"


def _how_to_go_on(plan: Plan, directory: RunDir) -> str:
    if isinstance(plan, ScriptPlan):
        return "a script's own checkpoints are where it writes them; start it again with launcher exec"
    if directory.complete_checkpoints():
        return f"go on with: {_resume_command(plan, directory)} {directory.path}"
    return "no checkpoint was saved, so the run begins anew with launcher run"

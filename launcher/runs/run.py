"""Running a job: creates a run directory, makes the plan and executes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import yaml
from rich.markup import escape

from launcher.errors import RequestError
from launcher.files import output_mode
from launcher.job import LoadedJob, ScriptJob
from launcher.job.user_path import user_path
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir, write_atomic, write_json
from launcher.runs.carry_out import OnStop, carry_out
from launcher.runs.console import RunConsole
from launcher.runs.failure_record import record_failure
from launcher.runs.imports import ImportsAhead
from launcher.runs.interrupts import check_main_thread, interruptible
from launcher.runs.outcome import RunResult
from launcher.runs.planning import CheckedJob, check_job, make_plan
from launcher.runs.reach import check_reach
from launcher.runs.remote import check_upload
from launcher.runs.run_lock import only_launcher_of
from launcher.runs.script import check_script


def run(job: LoadedJob, *, console: RunConsole | None = None) -> RunResult:
    """Plans and runs a job: places the nodes, starts the ranks, trains, saves and exports.

    Returns when the run has finished or was stopped; `console` prints the progress. Raises RequestError if the job is
    invalid, RunFailed if the run fails, and Interrupted if a signal stops it at once.
    """
    check_main_thread()
    checked = check_to_run(job)
    with output_mode(job.job.output_mode):
        directory = RunDir.create(user_path(job.job.output_dir, "output_dir"), job.job.name, mode=job.job.output_mode)
        with only_launcher_of(directory):
            return run_checked(checked, directory, console or RunConsole())


def check_to_run(loaded: LoadedJob) -> CheckedJob:
    """Checks that a job can be run from this machine. Raises RequestError."""
    checked = check_job(loaded)
    with loaded.locate_errors():
        if isinstance(loaded.job, ScriptJob):
            check_script(loaded.job)
        check_reach(loaded.job, checked.inputs.machine)
        check_upload(loaded.job)
    return checked


def run_checked(
    checked: CheckedJob, directory: RunDir, console: RunConsole, *, on_stop: OnStop | None = None
) -> RunResult:
    """Runs a checked job in a new run directory, whose lock the caller holds. Raises as `run` does.

    `on_stop` is called if a signal or a request stops the run.
    """
    with console.closing(), checked.loaded.locate_errors(), interruptible(console, directory) as interrupts:
        job, world = checked.loaded.job, checked.inputs.world
        with ImportsAhead(job, world, directory.logs / "imports.log") as imports:
            plan = plan_in(directory, checked, console, imports.begin)
            imports.begin()
            return carry_out(plan, directory.plan_file, directory, console, None, interrupts, imports.server, on_stop)


def plan_in(
    directory: RunDir, checked: CheckedJob, console: RunConsole, on_wait: Callable[[], None] = lambda: None
) -> Plan:
    """Makes the plan and writes it to the run directory. Removes the directory if the job is found to be invalid.

    `on_wait` is called if this takes longer, because the model or the data must be measured. Raises RequestError, and
    RunFailed if the measuring process fails.
    """
    try:
        directory.enter("planning")
        console.state("planning")
        if checked.loaded.overrides:
            directory.event({"event": "overrides", "values": list(checked.loaded.overrides)})
        write_atomic(directory.job_file, _job_text(checked.loaded))
        with (directory.logs / "prepare.log").open("wb") as log:
            plan = make_plan(checked, on_progress=_Preparing(directory, console, on_wait), log=log)
        _write_plan(plan, directory)
    except (RequestError, KeyboardInterrupt):
        # On a network file system, open files such as the lock may keep the folder.
        shutil.rmtree(directory.path, ignore_errors=True)
        raise
    except BaseException as error:
        record_failure(directory, error, console.note)
        raise
    for warning in plan.warnings:
        console.note(f"          [yellow]note:[/] {escape(warning)}")
    return plan


def _job_text(loaded: LoadedJob) -> bytes:
    """The bytes of the job file, or the job as YAML if it was not read from a file."""
    if loaded.file is not None:
        return loaded.file.read_bytes()
    return yaml.safe_dump(loaded.job.model_dump(mode="json", exclude_unset=True), sort_keys=False).encode()


def _write_plan(plan: Plan, directory: RunDir) -> None:
    """Writes plan.json and ds_config.json."""
    write_atomic(directory.plan_file, plan.to_json())
    write_json(directory.ds_config_file, plan.ds_config)
    directory.event({"event": "plan", "sha256": plan.sha256, "updates": plan.length.total_updates})


class _Preparing:
    """Enters the state "preparing" at the first progress message; cached data sends none."""

    def __init__(self, directory: RunDir, console: RunConsole, on_wait: Callable[[], None]) -> None:
        self._directory, self._console, self._on_wait, self._entered = directory, console, on_wait, False

    def __call__(self, progress: dict[str, object]) -> None:
        if not self._entered:
            self._entered = True
            self._directory.enter("preparing")
            self._console.state("preparing")
            self._on_wait()
        self._console.prepare(progress)

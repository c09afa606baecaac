"""Resuming a run from its newest checkpoint, also with another number of ranks or batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.files import output_mode
from launcher.plan.resume import Start
from launcher.plan_file import read_plan
from launcher.prepare.machine import measure_machine
from launcher.run_dir import RunDir, write_atomic
from launcher.runs.carry_out import OnStop, carry_out, ended
from launcher.runs.console import RunConsole
from launcher.runs.imports import ImportsAhead
from launcher.runs.interrupts import check_main_thread, interruptible
from launcher.runs.outcome import RunResult
from launcher.runs.reach import check_reach
from launcher.runs.remote import check_upload
from launcher.runs.rest import Rest, planned_run, rest_of
from launcher.runs.resume_steps import export_only, prepare_start, report_damage
from launcher.runs.run_lock import only_launcher_of
from launcher.runs.upload import uploading


def resume(directory: Path | str, *overrides: str, console: RunConsole | None = None) -> RunResult:
    """Resumes a stopped or failed run from its newest usable checkpoint, with `section.key=value` overrides.

    After a change of batch size or number of ranks, the learning rate continues at the same number of samples; after a
    change of schedule, the new one starts at the update that the run has reached. Raises as `launcher.run` does.
    """
    check_main_thread()
    run = planned_run(Path(directory))
    with output_mode(read_plan(run.plan_file).job.output_mode), only_launcher_of(run):
        return resume_locked(run, overrides, console or RunConsole())


def resume_locked(
    directory: RunDir,
    overrides: Sequence[str],
    console: RunConsole,
    rest: Rest | None = None,
    *,
    requeued: bool = False,
    on_stop: OnStop | None = None,
) -> RunResult:
    """Resumes a run whose lock the caller holds. `rest` is the result of `rest_of` if the caller has it.

    A run that Slurm's next job continues by itself (`requeued`) also resumes while cloud storage cannot be reached.
    `on_stop` is called if a signal or a request stops the run.
    """
    with console.closing(), interruptible(console, directory) as interrupts:
        rest = rest or rest_of(directory, overrides, console)
        plan, plan_file, start = rest.plan, rest.plan_file, rest.start
        if not requeued:
            check_upload(plan.job)
        report_damage(rest, directory, console)
        if rest.only_export:
            _record_resume(directory, start, [])
            with uploading(plan, directory, console, interrupts, start):
                return ended(plan, directory, console, export_only(rest, directory, console, interrupts))
        check_reach(plan.job, measure_machine())
        if plan_file is None:
            # Written only now: an invalid request must not leave a plan revision.
            plan_file = directory.next_plan_revision()
            write_atomic(plan_file, plan.to_json())
        console.note(f"resuming after update {start.update} of {plan.length.total_updates}")
        if plan.resumed:
            console.note(f"  {plan.resumed.arithmetic}")
        with ImportsAhead(plan.job, plan.world, directory.logs / "imports.log") as imports:
            imports.begin()
            prepare_start(start, directory, console)
            _record_resume(directory, start, overrides)
            return carry_out(plan, plan_file, directory, console, start, interrupts, imports.server, on_stop)


def _record_resume(directory: RunDir, start: Start, overrides: Sequence[str]) -> None:
    update, samples = start.update, start.samples
    directory.event({"event": "resume", "update": update, "samples": samples, "overrides": list(overrides)})

"""Resuming a run from its newest checkpoint, also with another number of ranks or batch size."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.markup import escape

from launcher.export_folder import export_fault, export_temporary
from launcher.files import output_mode
from launcher.manifest import content_fault
from launcher.plan_file import read_plan
from launcher.prepare.machine import measure_machine
from launcher.prepare.universal import make_universal
from launcher.run_dir import RunDir, universal_folder, write_atomic
from launcher.runs.carry_out import carry_out
from launcher.runs.checkpoints import set_aside
from launcher.runs.console import RunConsole
from launcher.runs.export import export_saved
from launcher.runs.failure_record import record_failure
from launcher.runs.interrupts import Interrupts, interruptible
from launcher.runs.outcome import Outcome, RunResult
from launcher.runs.reach import check_reach
from launcher.runs.rest import Rest, planned_run, rest_of
from launcher.runs.run_lock import only_launcher_of
from launcher.runs.summary import note_damaged_lines, print_summary


def resume(directory: Path | str, *overrides: str, console: RunConsole | None = None) -> RunResult:
    """Resumes a stopped or failed run from its newest usable checkpoint, with `section.key=value` overrides.

    After a change of batch size or number of ranks, the learning rate continues at the same number of samples; after a
    change of schedule, the new one starts at the update that the run has reached. Raises as `launcher.run` does.
    """
    run = planned_run(Path(directory))
    with output_mode(read_plan(run.plan_file).job.output_mode), only_launcher_of(run):
        return resume_locked(run, overrides, console or RunConsole())


def resume_locked(
    directory: RunDir, overrides: Sequence[str], console: RunConsole, rest: Rest | None = None
) -> RunResult:
    """Resumes a run whose lock the caller holds. `rest` is the result of `rest_of` if the caller has it."""
    with console.closing(), interruptible(console, directory) as interrupts:
        rest = rest or rest_of(directory, overrides, console)
        plan, plan_file, start = rest.plan, rest.plan_file, rest.start
        _report_damage(rest, directory, console)
        if rest.only_export:
            return _export(rest, directory, console, interrupts)
        check_reach(plan.job, measure_machine())
        if plan_file is None:
            # Written only now: an invalid request must not leave a plan revision.
            plan_file = directory.next_plan_revision()
            write_atomic(plan_file, plan.to_json())
        if start.convert:
            _convert(Path(start.checkpoint), directory, console)
        console.note(f"resuming after update {start.update} of {plan.length.total_updates}")
        if plan.resumed:
            console.note(f"  {plan.resumed.arithmetic}")
        directory.rewind(start.samples, start.update)
        note_damaged_lines(directory, console)
        directory.event(
            {"event": "resume", "update": start.update, "samples": start.samples, "overrides": list(overrides)}
        )
        return carry_out(plan, plan_file, directory, console, start, interrupts)


def _report_damage(rest: Rest, directory: RunDir, console: RunConsole) -> None:
    """Renames the damaged checkpoints, and reports them with the one that is used instead."""
    used = rest.saved.folder.name
    for each in rest.damaged:
        renamed = set_aside(directory, each, rest.saved)
        where = f" (renamed to {renamed.name})" if renamed else ""
        console.note(f"  [yellow]note:[/] {escape(str(each))}; using {used} instead{where}")


def _export(rest: Rest, directory: RunDir, console: RunConsole, interrupts: Interrupts) -> RunResult:
    """Makes the missing export of a run that has made all its updates."""
    update = rest.start.update
    console.note(f"all {update} updates were already made: exporting only ({export_fault(directory.export)})")
    directory.event({"event": "resume", "update": update, "samples": rest.start.samples, "overrides": []})
    directory.enter("exporting", update=update)
    console.state("exporting")
    # Left behind by the ranks of an earlier start.
    shutil.rmtree(export_temporary(directory.export), ignore_errors=True)
    try:
        export_saved(rest.saved, directory.export, lambda text: console.note(f"          {text}"))
    except KeyboardInterrupt:
        with suppress(OSError):
            directory.enter("stopped", reason=interrupts.reason)
        raise
    except BaseException as error:
        record_failure(directory, error, console.note)
        raise
    directory.enter("finished", update=update, reason=None)
    outcome = Outcome("finished", update)
    print_summary(rest.plan, directory, console, outcome)
    return RunResult(directory.path, outcome, 0)


def _convert(checkpoint: Path, directory: RunDir, console: RunConsole) -> None:
    """Converts a checkpoint to DeepSpeed's universal format, unless an undamaged conversion exists."""
    target = universal_folder(checkpoint)
    if target.is_dir() and (fault := content_fault(target)):
        console.note(f"  [yellow]note:[/] {escape(f'{target.name} cannot be used: {fault}')}; converting again")
        shutil.rmtree(target)
    if not target.is_dir():
        console.note("          converting the checkpoint for another number of ranks")
        with (directory.logs / "convert.log").open("ab") as log:
            make_universal(checkpoint, target, log)

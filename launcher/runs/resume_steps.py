"""The steps that resuming a run and restarting it after a failure share."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.markup import escape

from launcher.export_folder import export_fault
from launcher.manifest import content_fault
from launcher.plan.resume import Start
from launcher.prepare.universal import make_universal
from launcher.run_dir import RunDir, universal_folder
from launcher.runs.best_export import export_of_run
from launcher.runs.checkpoints import set_aside
from launcher.runs.console import RunConsole
from launcher.runs.interrupts import Interrupts
from launcher.runs.outcome import Outcome
from launcher.runs.rest import Rest
from launcher.runs.summary import note_damaged_lines


def report_damage(rest: Rest, directory: RunDir, console: RunConsole) -> None:
    """Renames the damaged checkpoints, and reports them with the one that is used instead."""
    used = rest.saved.folder.name
    for each in rest.damaged:
        renamed = set_aside(directory, each, rest.saved)
        where = f" (renamed to {renamed.name})" if renamed else ""
        console.note(f"  [yellow]note:[/] {escape(str(each))}; using {used} instead{where}")


def export_only(rest: Rest, directory: RunDir, console: RunConsole, interrupts: Interrupts) -> Outcome:
    """Makes the missing export of a run that has made all its updates. Raises RunFailed, which it records."""
    update = rest.start.update
    console.note(f"{escape(rest.why_complete)}: exporting only ({export_fault(directory.export)})")
    export_of_run(rest.plan, rest.saved, update, directory, console, interrupts)
    return rest.outcome


def prepare_start(start: Start, directory: RunDir, console: RunConsole) -> None:
    """Converts the checkpoint if necessary, and sets the lines of updates aside that will be repeated."""
    if start.convert:
        _convert(Path(start.checkpoint), directory, console)
    directory.rewind(start.samples, start.update)
    note_damaged_lines(directory, console)


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

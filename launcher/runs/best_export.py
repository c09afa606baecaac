"""`export: best`: exports the checkpoint with the lowest evaluation loss when the ranks have ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from rich.markup import escape

from launcher.errors import FailureCode, RequestError, RunFailed
from launcher.export_folder import export_temporary
from launcher.manifest import evaluation_loss
from launcher.plan.schema import Plan, Script
from launcher.run_dir import RunDir
from launcher.runs.checkpoints import SavedCheckpoint, best_verified, newest_verified
from launcher.runs.console import RunConsole
from launcher.runs.export import export_saved
from launcher.runs.failure_record import record_failure
from launcher.runs.interrupts import Interrupts
from launcher.watch.number_format import number


@dataclass(frozen=True)
class Best:
    """The checkpoint to export. `note` explains why it is not that of the best evaluation, if it is another one."""

    saved: SavedCheckpoint
    loss: float | None
    note: str | None


def exports_best(plan: Plan) -> bool:
    """Whether the launcher exports the best checkpoint when the ranks have ended."""
    return plan.job.export == "best" and not isinstance(plan.workload, Script)


def export_of_run(
    plan: Plan,
    newest: SavedCheckpoint | None,
    update: int,
    directory: RunDir,
    console: RunConsole,
    interrupts: Interrupts,
) -> None:
    """Makes the export of a run that has ended after `update` updates: of its best checkpoint, or of `newest`.

    Raises RunFailed, which it records.
    """

    def progress(text: str) -> None:
        console.note(f"          {text}")

    directory.enter("exporting", update=update)
    console.state("exporting")
    # Left behind by the ranks of an earlier start.
    shutil.rmtree(export_temporary(directory.export), ignore_errors=True)
    try:
        if exports_best(plan) or newest is None:
            _export(best_checkpoint(directory, progress), directory, progress)
        else:
            export_saved(newest, directory.export, progress)
    except KeyboardInterrupt:
        with suppress(OSError):
            directory.enter("stopped", reason=interrupts.reason)
        raise
    except BaseException as error:
        record_failure(directory, error, console.note)
        raise


def best_checkpoint(directory: RunDir, note: Callable[[str], None]) -> Best:
    """The best of the checkpoints that verify, or the newest if no evaluation loss is known. Raises RunFailed."""
    try:
        saved = best_verified(directory, note) or newest_verified(directory, note)[0]
    except RequestError as error:
        raise RunFailed(f"nothing can be exported: {error}", code=FailureCode.MISSING_FILE) from None
    loss = evaluation_loss(saved.folder)
    if loss is None:
        return Best(saved, None, "no checkpoint has an evaluation loss, so the newest one is exported")
    evaluations = [(each["loss"], each["update"]) for each in directory.evaluations() if _is_loss(each.get("loss"))]
    lowest, update = min(evaluations, default=(loss, saved.update))
    if lowest >= loss:
        return Best(saved, loss, None)
    when = "before the first update" if update == 0 else f"after update {update}"
    found = f"the lowest evaluation loss, {number(lowest)}, was {when}, where no usable checkpoint exists"
    return Best(saved, loss, f"{found}: the best of the existing checkpoints is exported")


def _export(best: Best, directory: RunDir, progress: Callable[[str], None]) -> None:
    if best.note:
        progress(f"[yellow]note:[/] {escape(best.note)}")
    loss = "" if best.loss is None else f", evaluation loss {number(best.loss)}"
    progress(f"exporting {best.saved.folder.name}{loss}")
    export_saved(best.saved, directory.export, progress)
    directory.event(
        {"event": "exported_best", "update": best.saved.update, "evaluation_loss": best.loss, "note": best.note}
    )


def _is_loss(value: object) -> bool:
    return isinstance(value, float)

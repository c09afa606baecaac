"""`launcher resume`: go on with a run from its last complete checkpoint."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from launcher.cli.console import RunConsole
from launcher.cli.failing import record_failure
from launcher.cli.run import (
    Interrupts,
    _summarise,
    alone_in,
    carry_out,
    check_reach,
    interruptible,
    note_damaged_lines,
)
from launcher.cli.watching import OUTPUT_DIR, RUN
from launcher.errors import Problem, RequestError
from launcher.export_folder import export_fault, export_temporary
from launcher.job import Job, validate_job
from launcher.job.read import apply_overrides
from launcher.job.schema import LENGTHS
from launcher.plan.batch import KEYS
from launcher.plan.checkpoint_conversion import must_convert, ranks_known, refuse_other_state
from launcher.plan.facts import MachineFacts
from launcher.plan.resolve import resolve_world
from launcher.plan.resume import Start, continued
from launcher.plan.schema import Plan
from launcher.prepare.machine import measure_machine
from launcher.run_dir import DamagedCheckpoint, RunDir, universal_folder, write_atomic
from launcher.runs.checkpoints import Saved, newest_saved
from launcher.runs.export import export_saved
from launcher.runs.planning import check_job, make_plan
from launcher.watch.find import find_run

_ORIGIN = "the resumed job"
_SETTLED = ("name", "model", "data", "output_dir", "train.seed")
_CHANGES_NO_WEIGHT = tuple(
    f"model.{name}" for name in ("gradient_checkpointing", "attn_implementation", "torch_compile", "liger")
)
_NOT_THE_CURVE = ("schedule.on_spike", "schedule.max_extensions", "schedule.check_every", "schedule.allow_unsafe")


def resume(
    run: str = RUN,
    overrides: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]...", help="What is to be other from here on."
    ),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Go on with a stopped or failed run from its last complete checkpoint, on other ranks or batches if need be.

    A changed batch or number of ranks keeps the learning rate where it was for the samples seen; a changed schedule
    begins at the update where the run stands.
    """
    directory = planned_run(find_run(run, output_dir).path)
    with alone_in(directory):
        go_on(directory, overrides or [], RunConsole())


def planned_run(path: Path) -> RunDir:
    """The run directory at `path`. Raises RequestError where no run was ever planned in it."""
    directory = RunDir(path.resolve())
    if not directory.plan_file.is_file():
        raise RequestError(Problem("there is no plan.json here, so this is not a run directory", file=str(path)))
    return directory


@dataclass(frozen=True)
class Rest:
    """The rest of a run: the plan for it, the file that holds that plan already, and where it starts.

    `saved` is the checkpoint that it starts from, and `damaged` are newer ones that cannot be used.
    """

    plan: Plan
    plan_file: Path | None
    start: Start
    saved: Saved
    damaged: tuple[DamagedCheckpoint, ...] = ()

    @property
    def only_export(self) -> bool:
        """Whether all updates are made."""
        return self.start.update >= self.plan.length.total_updates


def go_on(directory: RunDir, overrides: list[str], console: RunConsole, rest: Rest | None = None) -> None:
    """Goes on with a run that the caller holds. `rest` is what `rest_of` made of the overrides, where it was asked."""
    with console.closing(), interruptible(console, directory) as interrupts:
        rest = rest or rest_of(directory, overrides, console)
        plan, plan_file, start = rest.plan, rest.plan_file, rest.start
        _report_damage(rest, directory, console)
        if rest.only_export:
            _export(rest, directory, console, interrupts)
            return
        check_reach(plan.job, measure_machine())
        if plan_file is None:
            # Only now: a request that is refused leaves no revision behind.
            plan_file = directory.next_plan_revision()
            write_atomic(plan_file, plan.to_json())
        if start.convert:
            _convert(Path(start.checkpoint), directory, console)
        console.note(f"going on after update {start.update} of {plan.length.total_updates}")
        if plan.resumed:
            console.note(f"  {plan.resumed.arithmetic}")
        directory.rewind(start.samples, start.update)
        note_damaged_lines(directory, console)
        directory.event({"event": "resume", "update": start.update, "samples": start.samples, "overrides": overrides})
        carry_out(plan, plan_file, directory, console, start, interrupts)


def _report_damage(rest: Rest, directory: RunDir, console: RunConsole) -> None:
    """Says which checkpoints are damaged, and which one is used."""
    for each in rest.damaged:
        console.note(f"  [yellow]note:[/] {escape(str(each))}; {rest.saved.folder.name} is used")
        directory.event(
            {
                "event": "checkpoint_damaged",
                "checkpoint": each.path.name,
                "reason": each.reason,
                "used": rest.saved.folder.name,
            }
        )


def _export(rest: Rest, directory: RunDir, console: RunConsole, interrupts: Interrupts) -> None:
    """Makes the export that a run lacks whose updates are all made."""
    from launcher.runs.supervisor import Outcome

    update = rest.start.update
    console.note(f"all {update} updates are made: only the export is missing ({export_fault(directory.export)})")
    directory.event({"event": "resume", "update": update, "samples": rest.start.samples, "overrides": []})
    directory.enter("exporting", update=update)
    console.state("exporting")
    # The ranks' own, which nobody writes any more.
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
    _summarise(rest.plan, directory, console, Outcome("finished", update))


def job_of_run(directory: RunDir, overrides: list[str]) -> Job:
    """The job of what is left of a run under the overrides. Raises RequestError as `rest_of` does."""
    rest = where_to_go_on(directory)
    job = _job_with(rest.plan, overrides, measure_machine())[0]
    if ranks := ranks_known(rest.plan, job.cluster):
        must_convert(rest.plan, rest.saved.world_size, ranks)
    return job


def rest_of(directory: RunDir, overrides: list[str], console: RunConsole) -> Rest:
    """What is left of a run under the overrides. Raises RequestError where it cannot be gone on with."""
    rest = where_to_go_on(directory)
    lacks_export = rest.plan.job.export and export_fault(directory.export) is not None
    if rest.only_export and lacks_export and not _changes_length(rest.plan, overrides):
        # An export is the same on any ranks: in another allocation, `launcher node` overrides their number.
        return rest
    if overrides:
        rest = _changed(rest, overrides, measure_machine(), console)
    if rest.only_export:
        total = rest.plan.length.total_updates
        hint = f"train.max_steps={2 * total} would train on; launcher export makes another export"
        raise RequestError(Problem(f"all {total} updates are made already", file=str(directory.path), hint=hint))
    return rest


def where_to_go_on(directory: RunDir) -> Rest:
    """The plan in force at the last checkpoint that can be used, and the start from there. Raises RequestError."""
    saved, damaged = newest_saved(directory)
    start = Start(checkpoint=str(saved.folder), update=saved.update, samples=saved.samples)
    return Rest(saved.plan, saved.plan_file, start, saved, tuple(damaged))


def _changed(rest: Rest, overrides: list[str], machine: MachineFacts, console: RunConsole) -> Rest:
    """The rest of the run under the overrides."""
    old, start = rest.plan, rest.start
    job, keys = _job_with(old, overrides, machine)
    kept = old.recommendation.preset if old.recommendation and job.deepspeed == "auto" else None
    new = make_plan(job, check_job(job, _ORIGIN, machine), console.prepare, preset=kept)
    refuse_other_state(old, new)
    new_schedule = any(_changes_curve(key) for key in keys)
    plan = continued(old, new, start.update, start.samples, new_schedule=new_schedule)
    assert plan.resumed is not None
    convert = must_convert(old, rest.saved.world_size, plan.world.size)
    return replace(
        rest,
        plan=plan,
        plan_file=None,
        start=start.model_copy(update={"update": plan.resumed.update, "convert": convert}),
    )


def _changes_length(plan: Plan, overrides: list[str]) -> bool:
    _, keys = _job_with(plan, overrides, measure_machine())
    return any(key == f"train.{name}" for key in keys for name in LENGTHS)


def _changes_curve(key: str) -> bool:
    """Whether an override asks for another learning rate, or another length of the run."""
    if key in [f"train.{name}" for name in LENGTHS]:
        return True
    return key.startswith("schedule.") and key not in _NOT_THE_CURVE


def _job_with(old: Plan, overrides: list[str], machine: MachineFacts) -> tuple[Job, list[str]]:
    """The job with its overrides, and their keys. The batch stays as it was unless they name it."""
    data: dict[str, Any] = old.job.model_dump(mode="json", exclude_unset=True)
    keys = [".".join(key) for key in apply_overrides(data, overrides)]
    for key in keys:
        if _settled(key):
            raise RequestError(
                Problem(
                    "a run goes on with the model and the data that it began with",
                    key=key,
                    hint=f"launcher run starts a new run; of the model {', '.join(_CHANGES_NO_WEIGHT)} may change",
                )
            )
    train = data.setdefault("train", {})
    if "train.train_batch_size" not in keys:
        train["train_batch_size"] = old.train_batch_size
    micro, accumulation = KEYS[1:]
    if f"train.{accumulation}" not in keys:
        train.pop(accumulation, None)
    job = validate_job(data, origin=_ORIGIN)
    batch = job.train.train_batch_size
    if f"train.{micro}" not in keys and batch != "auto":
        kept = old.train_micro_batch_size_per_gpu
        divides = batch % (kept * resolve_world(job, machine).data_parallel_size) == 0
        job = validate_job({**data, "train": {**train, micro: kept if divides else "auto"}}, origin=_ORIGIN)
    return job, keys


def _settled(key: str) -> bool:
    """Whether a run cannot go on with another value of this key."""
    inside = any(key == settled or key.startswith(f"{settled}.") for settled in _SETTLED)
    return inside and key not in _CHANGES_NO_WEIGHT


def _convert(checkpoint: Path, directory: RunDir, console: RunConsole) -> None:
    """Makes a checkpoint loadable by any number of ranks, once."""
    from launcher.prepare.universal import make_universal

    target = universal_folder(checkpoint)
    if not target.is_dir():
        console.note("          converting the checkpoint for another number of ranks")
        with (directory.logs / "convert.log").open("ab") as log:
            make_universal(checkpoint, target, log)

"""`launcher resume`: go on with a run from its last complete checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from launcher.cli.console import RunConsole
from launcher.cli.run import alone_in, carry_out, check_reach, interruptible
from launcher.errors import Problem, RequestError
from launcher.job import Job, validate_job
from launcher.job.read import apply_override
from launcher.plan.batch import KEYS
from launcher.plan.facts import MachineFacts
from launcher.plan.model import Plan, ScriptPlan
from launcher.plan.resolve import resolve_world
from launcher.plan.resume import Start, continued
from launcher.planning import check_job, make_plan
from launcher.prepare.machine import measure_machine
from launcher.run_dir import RunDir, read_manifest, universal_folder, write_atomic

_ORIGIN = "the resumed job"
_SETTLED = ("name", "model.", "data.", "output_dir", "train.seed")
_NOT_THE_CURVE = ("schedule.on_spike", "schedule.max_extensions", "schedule.check_every", "schedule.allow_unsafe")


def resume(
    run: Path = typer.Argument(..., metavar="RUN", help="A run directory."),
    overrides: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]...", help="What is to be other from here on."
    ),
) -> None:
    """Go on with a stopped or failed run from its last complete checkpoint, on other ranks or batches if need be.

    A changed batch or number of ranks keeps the learning rate where it was for the samples seen; a changed schedule
    begins at the update where the run stands.
    """
    directory = RunDir(run.resolve())
    if not directory.plan_file.is_file():
        raise RequestError(Problem("there is no plan.json here, so this is not a run directory", file=str(run)))
    with alone_in(directory):
        go_on(directory, overrides or [], RunConsole())


def go_on(directory: RunDir, overrides: list[str], console: RunConsole) -> None:
    _refuse_script(directory)
    plan, plan_file, start = _where_to_go_on(directory)
    machine = measure_machine()
    with console.closing(), interruptible(console, directory) as interrupts:
        if overrides:
            plan, start = _changed(plan, start, overrides, machine, console)
        if start.update >= plan.length.total_updates:
            found = f"all {plan.length.total_updates} updates are made already"
            mend = f"train.max_steps={2 * plan.length.total_updates} would train on"
            raise RequestError(Problem(found, file=str(directory.path), mend=mend))
        check_reach(plan.job, machine)
        if overrides:
            # Only now: a request that is refused leaves no revision behind.
            plan_file = directory.next_plan_revision()
            write_atomic(plan_file, plan.to_json())
        if start.convert:
            _convert(Path(start.checkpoint), directory, console)
        console.note(f"going on after update {start.update} of {plan.length.total_updates}")
        if plan.resumed:
            console.note(f"  {plan.resumed.arithmetic}")
        directory.rewind(start.samples, start.update)
        directory.event("resume", update=start.update, samples=start.samples, overrides=overrides)
        carry_out(plan, plan_file, directory, console, start, interrupts)


def _refuse_script(directory: RunDir) -> None:
    """Raises RequestError where the run is that of a script of the user's own."""
    plan = Plan.from_json(directory.plan_file.read_text())
    if isinstance(plan, ScriptPlan):
        raise RequestError(
            Problem(
                f"this is a run of the script {' '.join(plan.script.arguments[:2])}, which keeps its own checkpoints",
                file=str(directory.path),
                mend="start it again with launcher exec, with the option by which the script goes on from them",
            )
        )


def _where_to_go_on(directory: RunDir) -> tuple[Plan, Path, Start]:
    """The plan in force at the last complete checkpoint, its file, and the start. Raises RequestError."""
    saved = directory.complete_checkpoints()
    if not saved:
        raise RequestError(Problem("there is no complete checkpoint to go on from", file=str(directory.checkpoints)))
    checkpoint = directory.checkpoint(saved[-1])
    manifest = read_manifest(checkpoint) or {}
    for file in (directory.plan_file, *directory.plan_revisions()):
        plan = Plan.from_json(file.read_text())
        if plan.sha256 == manifest["plan_sha256"]:
            start = Start(checkpoint=str(checkpoint), update=manifest["update"], samples=manifest["samples"])
            return plan, file, start
    raise RequestError(
        Problem(
            f"the plan {manifest['plan_sha256'][:12]}… that made {checkpoint.name} is gone", file=str(directory.path)
        )
    )


def _changed(
    old: Plan, start: Start, overrides: list[str], machine: MachineFacts, console: RunConsole
) -> tuple[Plan, Start]:
    """The plan for the rest of the run under the overrides, and where it starts."""
    job, keys = _job_with(old, overrides, machine)
    kept = old.recommendation.preset if old.recommendation and job.deepspeed == "auto" else None
    new = make_plan(job, check_job(job, _ORIGIN, machine), console.prepare, preset=kept)
    new_schedule = any(_changes_curve(key) for key in keys)
    plan = continued(old, new, start.update, start.samples, new_schedule=new_schedule)
    assert plan.resumed is not None
    manifest = read_manifest(Path(start.checkpoint)) or {}
    # Without ZeRO every rank has the whole state, and any number of ranks can load it.
    whole = plan.zero_stage == 0 and plan.precision == "fp32"
    convert = manifest["world_size"] != plan.world.size and not whole
    return plan, start.model_copy(update={"update": plan.resumed.update, "convert": convert})


def _changes_curve(key: str) -> bool:
    """Whether an override asks for another learning rate, or another length of the run."""
    if key in ("train.max_steps", "train.num_train_epochs", "train.total_samples"):
        return True
    return key.startswith("schedule.") and key not in _NOT_THE_CURVE


def _job_with(old: Plan, overrides: list[str], machine: MachineFacts) -> tuple[Job, list[str]]:
    """The job with its overrides, and their keys. The batch stays as it was unless they name it."""
    data: dict[str, Any] = old.job.model_dump(mode="json", exclude_unset=True)
    keys = [".".join(apply_override(data, override)) for override in overrides]
    for key in keys:
        if key.startswith(_SETTLED):
            raise RequestError(
                Problem(
                    "a run goes on with the model and the data that it began with",
                    key=key,
                    mend="launcher run starts anew",
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


def _convert(checkpoint: Path, directory: RunDir, console: RunConsole) -> None:
    """Makes a checkpoint loadable by any number of ranks, once."""
    from launcher.prepare.universal import make_universal

    target = universal_folder(checkpoint)
    if not target.is_dir():
        console.note("          converting the checkpoint for another number of ranks")
        with (directory.logs / "convert.log").open("ab") as log:
            make_universal(checkpoint, target, log)

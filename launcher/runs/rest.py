"""The rest of a run: the plan from a checkpoint to the end, with overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.export_folder import export_fault
from launcher.job import AnyJob, LoadedJob, validate_job
from launcher.job.read import apply_overrides
from launcher.job.schema import LENGTHS
from launcher.plan.batch import KEYS
from launcher.plan.checkpoint_conversion import check_same_kind_of_state, expected_ranks, must_convert
from launcher.plan.resume import Start, resumed_plan
from launcher.plan.schema import Plan
from launcher.run_dir import DamagedCheckpoint, RunDir
from launcher.runs.checkpoints import SavedCheckpoint, newest_checkpoint, newest_verified
from launcher.runs.console import RunConsole
from launcher.runs.outcome import Outcome
from launcher.runs.planning import check_job, make_plan

_ORIGIN = "the resumed job"
_FIXED = ("name", "model", "data", "output_dir", "output_mode", "train.seed")
_COMPUTING = ("gradient_checkpointing", "attn_implementation", "torch_compile", "liger", "chunked_loss")
_KEEPS_WEIGHTS = tuple(f"model.{name}" for name in _COMPUTING)
_NOT_THE_CURVE = ("schedule.on_spike", "schedule.max_extensions", "schedule.check_every", "schedule.allow_unsafe")


@dataclass(frozen=True)
class Rest:
    """The plan for the rest of a run, and its start. `plan_file` is None if the plan is not written yet.

    `saved` is the checkpoint from which it starts, and `damaged` are newer ones that cannot be loaded. `early_stop` is
    the reason for which early stopping ended the run there, if it did.
    """

    plan: Plan
    plan_file: Path | None
    start: Start
    saved: SavedCheckpoint
    damaged: tuple[DamagedCheckpoint, ...] = ()
    early_stop: str | None = None

    @property
    def only_export(self) -> bool:
        """Whether all updates were made before, or the run ended early, so that only the export may be missing."""
        return self.start.update >= self.plan.length.total_updates or self.early_stop is not None

    @property
    def why_complete(self) -> str:
        """Why no updates are left, as text."""
        if self.early_stop is not None:
            return f"the run ended after {self.start.update} updates ({self.early_stop})"
        return f"all {self.start.update} updates were already made"

    @property
    def outcome(self) -> Outcome:
        """The outcome of the run if no updates are left."""
        return Outcome("finished", self.start.update, self.early_stop)


def planned_run(path: Path) -> RunDir:
    """The run directory at `path`. Raises RequestError if it contains no plan."""
    directory = RunDir(path.resolve())
    if not directory.plan_file.is_file():
        raise RequestError(Problem("it has no plan.json, so it is not a run directory", file=str(path)))
    return directory


def rest_of(directory: RunDir, overrides: Sequence[str], console: RunConsole, *, verify: bool = True) -> Rest:
    """The rest of a run with overrides, from the newest checkpoint. Raises RequestError if it cannot be resumed.

    Whoever loads the checkpoint must `verify` it, which reads all its files. The launcher does so once for all ranks.
    """
    if verify:
        rest = rest_from(*newest_verified(directory, lambda text: console.note(f"          {text}")))
    else:
        rest = rest_as_planned(directory)
    needs_export = rest.plan.job.export and export_fault(directory.export) is not None
    if rest.only_export and needs_export and not _asks_for_updates(rest, overrides):
        # The export does not depend on the number of nodes, which `launcher node` overrides in another allocation.
        return rest
    if overrides:
        rest = _changed(rest, overrides, console)
    if rest.only_export:
        longer = f"train.max_steps={2 * rest.plan.length.total_updates}"
        more = longer if rest.early_stop is None else "train.early_stopping=null"
        hint = f"continue training with {more}, or export again with launcher export"
        raise RequestError(Problem(rest.why_complete, file=str(directory.path), hint=hint))
    return rest


def rest_as_planned(directory: RunDir) -> Rest:
    """The rest of a run from its newest checkpoint, under that checkpoint's plan. Raises RequestError.

    The checkpoint's files have their sizes; their content is not read.
    """
    return rest_from(*newest_checkpoint(directory))


def rest_from(saved: SavedCheckpoint, damaged: Sequence[DamagedCheckpoint]) -> Rest:
    """The rest of a run from a checkpoint, under the plan of that checkpoint."""
    start = Start(checkpoint=str(saved.folder), update=saved.update, samples=saved.samples)
    return Rest(saved.plan, saved.plan_file, start, saved, tuple(damaged), saved.early_stop)


def job_of_rest(directory: RunDir, overrides: Sequence[str]) -> LoadedJob:
    """The job of the rest of a run with overrides. Raises RequestError as `rest_of` does."""
    rest = rest_as_planned(directory)
    loaded, _ = _job_with(rest.plan, overrides)
    if ranks := expected_ranks(rest.plan, loaded.job.cluster):
        must_convert(rest.plan, rest.saved.world_size, ranks)
    return loaded


def rest_on(rest: Rest, nodes: int, console: RunConsole) -> Rest:
    """The rest of the run on another number of nodes. Raises RequestError if that is not possible."""
    return _changed(rest, [f"cluster.nodes={nodes}"], console)


def plan_on(plan: Plan, nodes: int, console: RunConsole) -> Plan:
    """The plan of the whole run on another number of nodes. Raises RequestError if that is not possible."""
    return _planned_again(plan, [f"cluster.nodes={nodes}"], console)[0]


def _planned_again(old: Plan, overrides: Sequence[str], console: RunConsole) -> tuple[Plan, list[str]]:
    """The plan of the whole run with overrides, and their keys."""
    loaded, keys = _job_with(old, overrides)
    checked = check_job(loaded, kept_micro_batch=old.train_micro_batch_size_per_gpu)
    return make_plan(checked, on_progress=console.prepare, preset=_preset_of(old, loaded.job)), keys


def _changed(rest: Rest, overrides: Sequence[str], console: RunConsole) -> Rest:
    """The rest of the run with overrides."""
    old, start = rest.plan, rest.start
    new, keys = _planned_again(old, overrides, console)
    check_same_kind_of_state(old, new)
    new_schedule = any(_changes_curve(key) for key in keys)
    plan = resumed_plan(old, new, start.update, start.samples, new_schedule=new_schedule)
    assert plan.resumed is not None
    convert = must_convert(old, rest.saved.world_size, plan.world.size)
    return replace(
        rest,
        plan=plan,
        plan_file=None,
        start=start.model_copy(update={"update": plan.resumed.update, "convert": convert}),
        early_stop=None if _asks_for_updates(rest, overrides) else rest.early_stop,
    )


def _preset_of(old: Plan, job: AnyJob) -> str | None:
    """The preset that `deepspeed: auto` chose before, if the job still has auto: checkpoints have its ZeRO stage."""
    recommendation = old.training.recommendation
    return recommendation.preset if recommendation and job.deepspeed == "auto" else None


def _asks_for_updates(rest: Rest, overrides: Sequence[str]) -> bool:
    """Whether overrides ask for more updates after the end: another length, or after an early stop another patience."""
    _, keys = _job_with(rest.plan, overrides)
    if rest.early_stop is not None and any(key.startswith("train.early_stopping") for key in keys):
        return True
    return any(key == f"train.{name}" for key in keys for name in LENGTHS)


def _changes_curve(key: str) -> bool:
    """Whether an override changes the learning-rate curve or the length of the run."""
    if key in [f"train.{name}" for name in LENGTHS]:
        return True
    return key.startswith("schedule.") and key not in _NOT_THE_CURVE


def _job_with(old: Plan, overrides: Sequence[str]) -> tuple[LoadedJob, list[str]]:
    """The job with the overrides, and their keys. The batch size stays the same unless they change it."""
    data: dict[str, Any] = old.job.model_dump(mode="json", exclude_unset=True)
    keys = [".".join(key) for key in apply_overrides(data, overrides)]
    for key in keys:
        if _is_fixed(key):
            raise RequestError(
                Problem(
                    "this cannot change when a run is resumed",
                    key=key,
                    hint=f"start a new run; in the model section, only {', '.join(_KEEPS_WEIGHTS)} may change",
                )
            )
    train = data.setdefault("train", {})
    batch, micro, accumulation = KEYS
    if "train.tokens_per_batch" in keys:
        train.pop(batch, None)
    elif f"train.{batch}" not in keys:
        train[batch] = old.train_batch_size
    if "train.tokens_per_batch" not in keys:
        train.pop("tokens_per_batch", None)
    for name in (micro, accumulation):
        if f"train.{name}" not in keys:
            train.pop(name, None)
    return LoadedJob(validate_job(data, origin=_ORIGIN), _ORIGIN), keys


def _is_fixed(key: str) -> bool:
    """Whether this key must not change when a run is resumed."""
    inside = any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)
    return inside and key not in _KEEPS_WEIGHTS

"""What an existing DeepSpeed JSON does to the learning rate, and what we would write in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.ds_config import DsConfig, read_ds_config
from launcher.ds_config.facts import AUTO, as_number
from launcher.errors import Problem, RequestError, nearest
from launcher.lr_report.curves import Curve, compared, schedule_curve
from launcher.lr_report.report import Report, late_notes
from launcher.schedule.curve import Schedule, deepspeed_blocks, make_schedule
from launcher.schedule.deepspeed_schedulers import DEFAULTS, resolved_params, simulate_deepspeed
from launcher.schedule.safety import deepspeed_warnings

SHAPES_OF = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
DEFAULT_OPTIMIZER_LR = 1e-3


@dataclass(frozen=True)
class _Written:
    """The scheduler of a DeepSpeed JSON with every "auto" told: None as type where there is none."""

    kind: str | None
    params: dict[str, Any]
    optimizer_lr: float
    updates: int
    notes: tuple[str, ...]


def deepspeed_report(path: Path, settings: Sequence[str], updates: int | None, shapes: Sequence[str]) -> Report:
    """What the JSON at `path` does as the engine applies it, with warnings, and the block we would write.

    `settings` are key=value pairs set over the JSON's; `updates` is the length of the run, its total_num_steps where
    None. Raises RequestError for a JSON that gives no curve.
    """
    if not path.is_file():
        raise RequestError(Problem("there is no such file", file=str(path), key="--deepspeed"))
    config = _with_settings(read_ds_config(path), settings)
    with _placed(config):
        written = _written(config, updates)
        if written.kind is None:
            return _without_scheduler(path, written, shapes)
        case = (written.kind, written.params, written.optimizer_lr, written.updates)
        own = Curve.of("as written", simulate_deepspeed(*case))
        warnings = deepspeed_warnings(*case)
    schedule, notes = _fixed(written)
    curves = [own, *_fixed_curves(schedule, shapes)]
    return Report(
        title=f"{path}: {written.kind}, {written.updates:,} updates, as the engine applies it",
        curves=tuple(curves),
        marks=_first_steps(written),
        notes=written.notes,
        warnings=tuple(warnings),
        blocks=_fixed_blocks(config, schedule),
        blocks_notes=notes,
    )


def _with_settings(config: DsConfig, settings: Sequence[str]) -> DsConfig:
    """The JSON with values set from the command line, such as scheduler.params.warmup_num_steps=100."""
    data = copy.deepcopy(config.data)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            message = f"{setting!r} is no setting, and with --deepspeed there is no job file"
            raise RequestError(Problem(message, hint="scheduler.params.warmup_num_steps=100, for example"))
        *parents, name = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RequestError(config.problem(key, f"{parent} is no block"))
        node[name] = as_number(value)
    return replace(config, data=data)


@contextmanager
def _placed(config: DsConfig) -> Iterator[None]:
    """Gives every problem from inside its file and line."""
    try:
        yield
    except RequestError as error:
        raise RequestError(
            *(p if p.file else config.problem(p.key or "scheduler", p.message, p.hint) for p in error.problems)
        ) from None


def _written(config: DsConfig, updates: int | None) -> _Written:
    """The scheduler as DeepSpeed will be given it. Raises RequestError for what nothing here tells."""
    block = config.get("scheduler")
    if block is None:
        return _Written(None, {}, _needed_lr(config), _needed_updates(updates), ())
    kind, params = _type_and_params(config, block)
    notes = _fill_auto(config, params, updates)
    if any(isinstance(value, list) for value in params.values()):
        notes.append("A list has one rate for each parameter group: shown is the first group.")
    total = resolved_params(kind, params).get("total_num_steps", 0)
    length = updates or (int(total) if total >= 1 else _needed_updates(None))
    return _Written(kind, params, _rate_before(config, kind, params), length, tuple(notes))


def _fill_auto(config: DsConfig, params: dict[str, Any], updates: int | None) -> list[str]:
    """Fills in what transformers would for "auto", where that is known here, and says so; refuses the rest."""
    known: dict[str, tuple[str, Callable[[], float]]] = {
        "total_num_steps": ("the updates of the run", lambda: _needed_updates(updates)),
        "warmup_min_lr": ("0", lambda: 0),
        "warmup_max_lr": ("its learning_rate", lambda: _needed_lr(config)),
    }
    notes = []
    for key in [key for key in known if params.get(key) == AUTO]:
        source, value = known[key]
        params[key] = value()
        told = f"transformers fills in {source}; shown with {params[key]}"
        notes.append(f'{key} is "auto": DeepSpeed leaves that alone, {told}.')
    message = '"auto" is filled in by transformers from its own arguments, which are unknown here'
    problems = [
        config.problem(f"scheduler.params.{key}", message, f"set it: scheduler.params.{key}=VALUE")
        for key, value in params.items()
        if value == AUTO
    ]
    if problems:
        raise RequestError(*problems)
    return notes


def _rate_before(config: DsConfig, kind: str, params: dict[str, Any]) -> float:
    """The optimizer's rate; where the JSON names none, the scheduler's own peak, which then rules in any case."""
    lr = _optimizer_lr(config)
    if lr is not None:
        return lr
    if kind == "WarmupCosineLR" or (kind == "WarmupLR" and params.get("warmup_max_lr") is None):
        return _needed_lr(config)
    return _first(params.get("warmup_max_lr"), DEFAULT_OPTIMIZER_LR)


def _type_and_params(config: DsConfig, block: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        message = 'a block {"type": …, "params": {…}} was expected'
        raise RequestError(config.problem("scheduler", message, f"types: {', '.join(DEFAULTS)}"))
    kind, params = block["type"], block.get("params", {})
    if kind not in DEFAULTS:
        close = nearest(kind, DEFAULTS)
        hint = f"did you mean {close}?" if close else f"DeepSpeed's own are {', '.join(DEFAULTS)}"
        raise RequestError(config.problem("scheduler.type", f"{kind!r} is not one of DeepSpeed's schedulers", hint))
    if not isinstance(params, dict):
        raise RequestError(config.problem("scheduler.params", f"a block was expected, found {params!r}"))
    return kind, dict(params)


def _needed_updates(updates: int | None) -> int:
    if updates is None:
        raise RequestError(Problem("nothing here says how many updates the run has", hint="add --updates N"))
    return updates


def _optimizer_lr(config: DsConfig) -> float | None:
    """The optimizer's rate: DeepSpeed's default where the block names none; None without a block, and for "auto"."""
    if config.get("optimizer") is None or config.get("optimizer.params.lr") == AUTO:
        return None
    lr = config.get("optimizer.params.lr", DEFAULT_OPTIMIZER_LR)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr >= 0:
        raise RequestError(config.problem("optimizer.params.lr", f"a rate of 0 or more was expected, found {lr!r}"))
    return float(lr)


def _needed_lr(config: DsConfig) -> float:
    lr = _optimizer_lr(config)
    if lr is None:
        what = 'is "auto"' if config.get("optimizer") is not None else "is not in this JSON"
        what += ", and no scheduler names a rate" if config.get("scheduler") is None else ""
        hint = "set it: optimizer.params.lr=1e-5; or let a job file's schedule decide it: launcher lr job.yaml"
        raise RequestError(config.problem("optimizer.params.lr", f"the optimizer's rate {what}", hint))
    return lr


def _first(value: Any, default: float) -> float:
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, int | float) else default


def _first_steps(written: _Written) -> dict[int, str]:
    """What the engine did to the scheduler before each of the first updates."""
    last = written.params.get("last_batch_iteration", -1)
    words = ["set by the constructor", *(f"after step {u}: i = {last + u}" for u in (1, 2, 3))]
    return {update: word for update, word in enumerate(words) if update < written.updates}


def _without_scheduler(path: Path, written: _Written, shapes: Sequence[str]) -> Report:
    if shapes:
        raise RequestError(Problem("without a scheduler there is no warm-up to compare with", key="--compare"))
    warning = (
        f"There is no scheduler block: every update runs at {written.optimizer_lr:g} from the first on, without "
        "a warm-up, unless the script gives deepspeed.initialize a scheduler of its own."
    )
    return Report(
        title=f"{path}: no scheduler, {written.updates:,} updates",
        curves=(Curve.of("as written", [written.optimizer_lr] * written.updates),),
        warnings=(warning,),
        blocks_notes=("A schedule with a warm-up comes from a job file: launcher lr job.yaml.",),
    )


def _fixed(written: _Written) -> tuple[Schedule | None, tuple[str, ...]]:
    """The schedule that was probably meant, and what to say of it."""
    kind = written.kind or ""
    full = resolved_params(kind, written.params)
    if kind not in SHAPES_OF:
        return None, (f"{kind} has no warm-up schedule in its place; a job file gives one: launcher lr job.yaml.",)
    warmup, total = full["warmup_num_steps"], written.updates
    if warmup >= total:
        shorter = f"scheduler.params.warmup_num_steps={max(1, total // 5)}"
        return None, (f"A warm-up of {warmup} updates leaves nothing of a run of {total}; try {shorter}.",)
    peak = _first(written.params.get("warmup_max_lr"), written.optimizer_lr)
    floor = full.get("cos_min_ratio")
    if kind == "WarmupDecayLR" and full["warmup_min_lr"] > peak / (warmup + 1):
        floor = full["warmup_min_lr"] / peak
    shape = SHAPES_OF[kind]
    try:
        schedule = make_schedule(shape, peak_lr=peak, warmup_updates=warmup, total_updates=total, floor=floor)
    except RequestError as error:
        return None, (f"No block is proposed in its place: {error.problems[0].message}.",)
    notes = (
        f"What we would write for {warmup} updates of warm-up to {peak:g}: the curve `fixed`, with the block below.",
    )
    return schedule, (*notes, *late_notes(deepspeed_blocks(schedule)["scheduler"], peak))


def _fixed_curves(schedule: Schedule | None, shapes: Sequence[str]) -> list[Curve]:
    if schedule is None:
        if shapes:
            raise RequestError(Problem("there is no peak and warm-up here to compare with", key="--compare"))
        return []
    own = schedule_curve(schedule, "fixed")
    return compared(own, shapes, schedule.peak_lr, schedule.warmup_updates, schedule.total_updates)


def _fixed_blocks(config: DsConfig, schedule: Schedule | None) -> dict[str, Any] | None:
    """The optimizer block as written with the peak in it, and the scheduler block."""
    if schedule is None:
        return None
    blocks = deepspeed_blocks(schedule)
    written = config.get("optimizer")
    if isinstance(written, dict):
        params = {**(written.get("params") or {}), "lr": schedule.peak_lr}
        blocks["optimizer"] = {**written, "params": params}
    return blocks

"""The learning rate under an existing DeepSpeed JSON, and the scheduler block that the launcher would write."""

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
from launcher.job.schema import MOST_UPDATES
from launcher.lr_report.curves import Curve, schedule_curve, with_shapes
from launcher.lr_report.report import LRReport, paste_notes
from launcher.schedule.curve import Schedule, deepspeed_blocks, make_schedule
from launcher.schedule.deepspeed_schedulers import DEFAULTS, resolved_params, simulate_deepspeed
from launcher.schedule.safety import deepspeed_warnings

SHAPES_OF = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
DEFAULT_OPTIMIZER_LR = 1e-3
_LARGEST_LR = 1e100


@dataclass(frozen=True)
class _WrittenScheduler:
    """The scheduler of a DeepSpeed JSON with "auto" values filled; `kind` is None if there is no scheduler."""

    kind: str | None
    params: dict[str, Any]
    optimizer_lr: float
    updates: int
    notes: tuple[str, ...]


def deepspeed_report(path: Path, settings: Sequence[str], updates: int | None, shapes: Sequence[str]) -> LRReport:
    """The curve of the JSON at `path` as the engine applies it, with warnings and the launcher's own block.

    `settings` are key=value pairs that override the JSON; `updates` is the length of the run (None: total_num_steps).
    Raises RequestError for a JSON without a curve.
    """
    if not path.is_file():
        raise RequestError(Problem("file not found", file=str(path), key="--deepspeed"))
    config = _with_settings(read_ds_config(path), settings)
    if updates is not None:
        _check_length(updates, "--updates")
    with _locate_problems(config):
        written = _written(config, updates)
        if written.kind is None:
            report = _without_scheduler(path, written, shapes)
            _check_finite(report.curves[0], config)
            return report
        arguments = (written.kind, written.params, written.optimizer_lr, written.updates)
        own = Curve.of("as written", simulate_deepspeed(*arguments))
        _check_finite(own, config)
        warnings = deepspeed_warnings(*arguments)
    schedule, notes = _fixed(written)
    curves = [own, *_fixed_curves(schedule, shapes)]
    return LRReport(
        title=f"{path}: {written.kind}, {written.updates:,} updates, as the engine applies it",
        curves=tuple(curves),
        marks=_first_steps(written),
        notes=written.notes,
        warnings=tuple(warnings),
        blocks=_fixed_blocks(config, schedule),
        blocks_notes=notes,
    )


def _check_finite(curve: Curve, config: DsConfig) -> None:
    """Raises RequestError if a learning rate is NaN, Inf or so large that the sum of all is."""
    if not all(abs(lr) < _LARGEST_LR for lr in curve.lrs):
        key = "scheduler.params" if config.get("scheduler") else "optimizer.params.lr"
        raise RequestError(config.problem(key, f"a learning rate is NaN, Inf or above {_LARGEST_LR:g}"))


def _with_settings(config: DsConfig, settings: Sequence[str]) -> DsConfig:
    """The JSON with values from the command line, such as scheduler.params.warmup_num_steps=100."""
    data = copy.deepcopy(config.data)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            message = f"{setting!r} is not a setting, and --deepspeed does not use a job file"
            raise RequestError(Problem(message, hint="for example scheduler.params.warmup_num_steps=100"))
        *parents, name = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RequestError(config.problem(key, f"{parent} is not a block"))
        node[name] = as_number(value)
    return replace(config, data=data)


@contextmanager
def _locate_problems(config: DsConfig) -> Iterator[None]:
    """Adds file and line to every problem from inside the `with` block."""
    try:
        yield
    except RequestError as error:
        raise RequestError(
            *(p if p.file else config.problem(p.key or "scheduler", p.message, p.hint) for p in error.problems)
        ) from None


def _written(config: DsConfig, updates: int | None) -> _WrittenScheduler:
    """The scheduler as DeepSpeed receives it. Raises RequestError for missing values."""
    block = config.get("scheduler")
    if block is None:
        return _WrittenScheduler(None, {}, _require_lr(config), _require_updates(updates), ())
    kind, params = _type_and_params(config, block)
    notes = _fill_auto(config, params, updates)
    if any(isinstance(value, list) for value in params.values()):
        notes.append("A list has one learning rate per parameter group; the report shows the first group.")
    total = resolved_params(kind, params).get("total_num_steps", 0)
    if updates is None:
        _check_length(total, "scheduler.params.total_num_steps")
    length = updates or (int(total) if total >= 1 else _require_updates(None))
    return _WrittenScheduler(kind, params, _initial_lr(config, kind, params), length, tuple(notes))


def _fill_auto(config: DsConfig, params: dict[str, Any], updates: int | None) -> list[str]:
    """Fills the "auto" values of `params` as transformers would, and returns notes. Raises RequestError for others."""
    known: dict[str, tuple[str, Callable[[], float]]] = {
        "total_num_steps": ("the number of updates", lambda: _require_updates(updates)),
        "warmup_min_lr": ("0", lambda: 0),
        "warmup_max_lr": ("its learning_rate", lambda: _require_lr(config)),
    }
    notes = []
    for key in [key for key in known if params.get(key) == AUTO]:
        source, value = known[key]
        params[key] = value()
        notes.append(f'{key} is "auto": transformers fills in {source}; the report uses {params[key]}.')
    message = '"auto" is filled in by transformers from its arguments, which are unknown here'
    problems = [
        config.problem(f"scheduler.params.{key}", message, f"set it: scheduler.params.{key}=VALUE")
        for key, value in params.items()
        if value == AUTO
    ]
    if problems:
        raise RequestError(*problems)
    return notes


def _initial_lr(config: DsConfig, kind: str, params: dict[str, Any]) -> float:
    """The optimizer's learning rate; if the JSON has none, the scheduler's peak, which overrides it anyway."""
    lr = _optimizer_lr(config)
    if lr is not None:
        return lr
    if kind == "WarmupCosineLR" or (kind == "WarmupLR" and params.get("warmup_max_lr") is None):
        return _require_lr(config)
    return _first(params.get("warmup_max_lr"), DEFAULT_OPTIMIZER_LR)


def _type_and_params(config: DsConfig, block: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        message = 'expected a block {"type": …, "params": {…}}'
        raise RequestError(config.problem("scheduler", message, f"types: {', '.join(DEFAULTS)}"))
    kind, params = block["type"], block.get("params", {})
    if kind not in DEFAULTS:
        close = nearest(kind, DEFAULTS)
        hint = f"did you mean {close}?" if close else f"DeepSpeed's schedulers: {', '.join(DEFAULTS)}"
        raise RequestError(config.problem("scheduler.type", f"{kind!r} is not one of DeepSpeed's schedulers", hint))
    if not isinstance(params, dict):
        raise RequestError(config.problem("scheduler.params", f"expected a block, found {params!r}"))
    return kind, dict(params)


def _check_length(updates: float, key: str) -> None:
    if updates > MOST_UPDATES:
        raise RequestError(Problem(f"the run has {updates:,} updates, more than {MOST_UPDATES:,}", key=key))


def _require_updates(updates: int | None) -> int:
    if updates is None:
        raise RequestError(Problem("the number of updates is unknown", hint="add --updates N"))
    return updates


def _optimizer_lr(config: DsConfig) -> float | None:
    """The optimizer's learning rate, or its default; None without an optimizer block and for "auto"."""
    if config.get("optimizer") is None or config.get("optimizer.params.lr") == AUTO:
        return None
    lr = config.get("optimizer.params.lr", DEFAULT_OPTIMIZER_LR)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr >= 0:
        raise RequestError(
            config.problem("optimizer.params.lr", f"expected a learning rate of 0 or more, found {lr!r}")
        )
    return float(lr)


def _require_lr(config: DsConfig) -> float:
    lr = _optimizer_lr(config)
    if lr is None:
        what = 'is "auto"' if config.get("optimizer") is not None else "is not in this JSON"
        what += ", and no scheduler sets one" if config.get("scheduler") is None else ""
        hint = "set it: optimizer.params.lr=1e-5; or use the schedule of a job file: launcher lr job.yaml"
        raise RequestError(config.problem("optimizer.params.lr", f"the optimizer's learning rate {what}", hint))
    return lr


def _first(value: Any, default: float) -> float:
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, int | float) else default


def _first_steps(written: _WrittenScheduler) -> dict[int, str]:
    """How the engine set the learning rate of each of the first updates."""
    last = written.params.get("last_batch_iteration", -1)
    words = ["set by the constructor", *(f"after step {u}: i = {last + u}" for u in (1, 2, 3))]
    return {update: word for update, word in enumerate(words) if update < written.updates}


def _without_scheduler(path: Path, written: _WrittenScheduler, shapes: Sequence[str]) -> LRReport:
    if shapes:
        raise RequestError(Problem("--compare needs a scheduler with a warm-up", key="--compare"))
    warning = (
        f"The JSON has no scheduler block: every update uses {written.optimizer_lr:g}, without a warm-up, unless the "
        "script passes a scheduler to deepspeed.initialize."
    )
    return LRReport(
        title=f"{path}: no scheduler, {written.updates:,} updates",
        curves=(Curve.of("as written", [written.optimizer_lr] * written.updates),),
        warnings=(warning,),
        blocks_notes=("For a schedule with a warm-up use a job file: launcher lr job.yaml.",),
    )


def _fixed(written: _WrittenScheduler) -> tuple[Schedule | None, tuple[str, ...]]:
    """The schedule that the JSON probably intends, and notes on it."""
    kind = written.kind or ""
    full = resolved_params(kind, written.params)
    if kind not in SHAPES_OF:
        return None, (
            f"The launcher has no replacement for {kind}; use the schedule of a job file: launcher lr job.yaml.",
        )
    warmup, total = full["warmup_num_steps"], written.updates
    if warmup >= total:
        shorter = f"scheduler.params.warmup_num_steps={max(1, total // 5)}"
        return None, (f"The warm-up of {warmup} updates is not shorter than the run of {total}; try {shorter}.",)
    peak = _first(written.params.get("warmup_max_lr"), written.optimizer_lr)
    floor = full.get("cos_min_ratio")
    if kind == "WarmupDecayLR" and full["warmup_min_lr"] > peak / (warmup + 1):
        floor = full["warmup_min_lr"] / peak
    shape = SHAPES_OF[kind]
    try:
        schedule = make_schedule(shape, peak_lr=peak, warmup_updates=warmup, total_updates=total, floor=floor)
    except RequestError as error:
        return None, (f"The launcher has no replacement for this block: {error.problems[0].message}.",)
    notes = [f"For {warmup} updates of warm-up to {peak:g} the launcher writes the block below: the curve `fixed`."]
    if shape == "linear" and full["warmup_min_lr"] < schedule.floor_lr:
        notes.append(
            f"WarmupDecayLR has one minimum for both ends, so it ends at {schedule.floor_lr:.3g}. In a job file, "
            "schedule.floor: 0 decays to zero."
        )
    return schedule, (*notes, *paste_notes(deepspeed_blocks(schedule)["scheduler"], peak))


def _fixed_curves(schedule: Schedule | None, shapes: Sequence[str]) -> list[Curve]:
    if schedule is None:
        if shapes:
            raise RequestError(Problem("--compare needs a scheduler with a peak and a warm-up", key="--compare"))
        return []
    own = schedule_curve(schedule, "fixed")
    return with_shapes(own, shapes, schedule.peak_lr, schedule.warmup_updates, schedule.total_updates)


def _fixed_blocks(config: DsConfig, schedule: Schedule | None) -> dict[str, Any] | None:
    """The user's optimizer block with the peak, and the scheduler block."""
    if schedule is None:
        return None
    blocks = deepspeed_blocks(schedule)
    written = config.get("optimizer")
    if isinstance(written, dict):
        found = written.get("params")
        params = {**(found if isinstance(found, dict) else {}), "lr": schedule.peak_lr}
        blocks["optimizer"] = {**written, "params": params}
    return blocks

"""The scheduler block: values that DeepSpeed's schedulers reject or use in an unexpected way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launcher.ds_config.catalogue import DEEPSPEED_SCHEDULERS, Catalogue
from launcher.ds_config.facts import AUTO, as_bool, as_number, has_auto_warmup
from launcher.ds_config.findings import Finding, Severity, finding, rewrite
from launcher.ds_config.read import DsConfig
from launcher.ds_config.rule_context import Rule, RuleContext
from launcher.errors import nearest

WARMUPS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
DEFAULT_WARMUP_UPDATES = 1000


PARAMETER_GROUPS = 2
"""In the launcher's loop: matrices with weight decay, vectors without."""
_LRS = ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr")
_MOMENTA = ("cycle_min_mom", "cycle_max_mom")
_RATIOS = ("warmup_min_ratio", "cos_min_ratio")
_NEGATIVE_LR = {
    "lr_range_test_step_rate": "the learning rate falls below 0",
    "decay_lr_rate": "the learning rate grows without bound, then falls below 0",
    "decay_step_size": "the learning rate grows without bound, then falls below 0",
}
"""Slopes and numbers of updates that make the learning rate negative if they are negative."""


def _schedule(context: RuleContext) -> Iterator[Finding]:
    """What is wrong or doubtful in the scheduler block."""
    config, keys = context.config, context.keys
    kind = config.get("scheduler.type")
    if not isinstance(kind, str) or kind == AUTO:
        return
    if kind not in keys.schedulers:
        yield _unknown(config, kind, keys)
        return
    yield from _missing(config, kind, keys)
    if context.stage and not _is_deepspeed_scheduler(kind):
        message = f"{kind} is a PyTorch scheduler, and fails with the optimizer that ZeRO wraps"
        yield finding(config, "error", "scheduler.type", message, "Use WarmupDecayLR or WarmupCosineLR.")
    if kind in WARMUPS:
        yield from _warmup(config, kind)
        yield from _lrs(config, kind)
    if _is_deepspeed_scheduler(kind):
        yield from _lists(context)
        yield from _out_of_range(config)
        yield from _lengths(config)
        yield from _momentum(config, kind)


def _momentum(config: DsConfig, kind: str) -> Iterator[Finding]:
    if kind != "OneCycle" or as_bool(_params(config).get("cycle_momentum", True)) is False:
        return
    name = str(config.get("optimizer.type", "adamw")).lower()
    if name.startswith(("adam", "nadam", "radam", "lion", "lamb")):
        low, high = _params(config).get("cycle_min_mom", 0.8), _params(config).get("cycle_max_mom", 0.9)
        message = f"OneCycle replaces the optimizer's betas: beta1 cycles between {high} and {low}, beta2 is 0.99"
        yield finding(config, "warning", "scheduler.params", message, 'Add "cycle_momentum": false to keep them.')


def _lists(context: RuleContext) -> Iterator[Finding]:
    for name, value in _params(context.config).items():
        path = f"scheduler.params.{name}"
        if not isinstance(value, list):
            continue
        if name not in (*_LRS, *_MOMENTA):
            yield context.finding("error", path, f"found {value!r}", "Write one number, not a list.")
        elif len(value) != PARAMETER_GROUPS and not context.target.script:
            message = (
                f"{len(value)} values, but the launcher trains {PARAMETER_GROUPS} parameter groups: DeepSpeed fails"
            )
            yield context.finding("error", path, message, "Write one number.")


def _out_of_range(config: DsConfig) -> Iterator[Finding]:
    """DeepSpeed accepts negative learning rates, which increase the loss, and ratios above 1."""
    params = _params(config)
    for name, value in params.items():
        path = f"scheduler.params.{name}"
        numbers = [as_number(one) for one in (value if isinstance(value, list) else [value])]
        numbers = [one for one in numbers if _is_number(one)]
        if name in _LRS and any(one < 0 for one in numbers):
            message = f"found {value!r}: a learning rate below 0 increases the loss"
            yield finding(config, "error", path, message, "Write a number of at least 0.")
        elif name in _RATIOS and any(not 0 <= one <= 1 for one in numbers):
            message = f"found {value!r}: a fraction of the peak must be from 0 to 1"
            yield finding(config, "error", path, message, "Write a number from 0 to 1.")
        elif name in _MOMENTA and any(not 0 <= one < 1 for one in numbers):
            message = f"found {value!r}: momentum must be at least 0 and below 1"
            yield finding(config, "error", path, message, "Write a number of at least 0 and below 1.")
        elif name in _NEGATIVE_LR and any(one < 0 for one in numbers):
            message = f"found {value!r}: {_NEGATIVE_LR[name]}"
            yield finding(config, "error", path, message, "Write a number of at least 0.")


def _lengths(config: DsConfig) -> Iterator[Finding]:
    """An inverted cycle, and lengths of OneCycle and LRRangeTest that DeepSpeed rejects."""
    params = _params(config)
    low, high = (_lr(config, f"scheduler.params.cycle_{end}_lr") for end in ("min", "max"))
    if low is not None and high is not None and low > high:
        message = f"starts at {low:g}, above the peak of {high:g}: the learning rate would fall first, then rise"
        yield finding(config, "error", "scheduler.params.cycle_min_lr", message, "Write a lower number.")
    first, second = (as_number(params.get(f"cycle_{half}_step_size")) for half in ("first", "second"))
    steps = params.get("lr_range_test_step_size")
    if _is_number(first) and first <= 0:
        yield finding(
            config, "error", "scheduler.params.cycle_first_step_size", f"found {first!r}", "Write a number above 0."
        )
    if _is_number(second) and second < 0:
        yield finding(
            config,
            "error",
            "scheduler.params.cycle_second_step_size",
            f"found {second!r}",
            "Write a number of at least 0.",
        )
    if steps not in (None, AUTO) and (type(steps) is not int or steps < 1):
        path = "scheduler.params.lr_range_test_step_size"
        yield finding(config, "error", path, f"found {steps!r}", "Write a whole number above 0.")


def _params(config: DsConfig) -> dict[str, Any]:
    params = config.get("scheduler.params")
    return params if isinstance(params, dict) else {}


def _is_deepspeed_scheduler(kind: str) -> bool:
    """Whether a scheduler is one of DeepSpeed's, not PyTorch's."""
    return kind in DEEPSPEED_SCHEDULERS


def _unknown(config: DsConfig, kind: str, keys: Catalogue) -> Finding:
    close = nearest(kind, keys.schedulers)
    same = [name for name in keys.schedulers if name.lower() == kind.lower()]
    hint = f"Did you mean {same[0] if same else close}?" if same or close else "Use WarmupDecayLR or WarmupCosineLR."
    fix = rewrite(config, "scheduler.type", f'"{same[0]}"') if same else None
    return finding(config, "error", "scheduler.type", f"DeepSpeed has no scheduler {kind}", hint, fix)


def _missing(config: DsConfig, kind: str, keys: Catalogue) -> Iterator[Finding]:
    params = config.get("scheduler.params")
    if params is None:
        yield finding(config, "error", "scheduler", "fails without a params block", 'Add "params": {…}.')
    names = [name for name, key in keys.schedulers[kind].keys.items() if key.required]
    for name in names:
        if isinstance(params, dict) and name not in params:
            message = f"{kind} fails without {name}"
            yield finding(config, "error", "scheduler.params", message, f'Add "{name}", or "{name}": "auto".')


def _warmup(config: DsConfig, kind: str) -> Iterator[Finding]:
    params = config.get("scheduler.params")
    if not isinstance(params, dict):
        return
    written, total = params.get("warmup_num_steps"), as_number(params.get("total_num_steps"))
    updates = DEFAULT_WARMUP_UPDATES if written is None else written
    if written is not None and written != AUTO and (type(written) is not int or written < 1):
        path = "scheduler.params.warmup_num_steps"
        yield finding(config, "error", path, f"found {written!r}", "Write a whole number above 0.")
    elif _is_number(updates) and _is_number(total) and updates >= total:
        yield _too_long(config, updates, total, written is None)
    yield from _warmup_type(config, params, kind)
    start = params.get("last_batch_iteration")
    if isinstance(start, (int, float)) and start >= 0:
        message = "update 0 uses the optimizer's full learning rate: a resume sets this key itself"
        yield finding(config, "error", "scheduler.params.last_batch_iteration", message, "Remove it.")


def _too_long(config: DsConfig, updates: Any, total: Any, by_default: bool) -> Finding:
    default = " (the default)" if by_default else ""
    message = f"the warm-up of {updates} updates{default} is not shorter than the run of {total}"
    path = "scheduler.params" if by_default else "scheduler.params.warmup_num_steps"
    hint = "Write warmup_num_steps well below total_num_steps: else the learning rate falls to its minimum at once."
    return finding(config, "error", path, message, hint, unsafe=True)


def _warmup_type(config: DsConfig, params: dict[str, Any], kind: str) -> Iterator[Finding]:
    form = params.get("warmup_type")
    path = "scheduler.params.warmup_type"
    if has_auto_warmup(config):
        if form is None:
            message = "no warmup_type: the launcher fills in linear; transformers' Trainer keeps the steep log ramp"
            yield finding(config, "note", "scheduler.params", message, 'Add "warmup_type": "linear".')
    elif form is None:
        message = "no warmup_type: the default is log, at 35% of the peak after 10 of 1000 updates"
        yield finding(config, "warning", "scheduler.params", message, 'Add "warmup_type": "linear".')
    elif form == "log":
        message = "a log warm-up is steep: 35% of the peak after 10 of 1000 updates"
        yield finding(config, "note", path, message, 'Write "linear" for a gentler one.')
    elif form not in ("linear", AUTO):
        message = f"{form!r} is not an allowed value, and {kind} uses log instead"
        yield finding(config, "error", path, message, 'Write "linear".')


def _lrs(config: DsConfig, kind: str) -> Iterator[Finding]:
    low, high = (
        _lr(config, "scheduler.params.warmup_min_lr"),
        _lr(config, "scheduler.params.warmup_max_lr"),
    )
    peak = _lr(config, "optimizer.params.lr")
    path = "scheduler.params.warmup_max_lr"
    if kind == "WarmupDecayLR" and config.get(path) is None:
        message = "no warmup_max_lr: WarmupDecayLR peaks at 1e-3, whatever the optimizer's lr is"
        hint = 'Add "warmup_max_lr", or "warmup_max_lr": "auto".'
        yield finding(config, "error", "scheduler.params", message, hint, unsafe=True)
    if high is not None and peak is not None and high != peak:
        message = f"peaks at {high:g}, but optimizer.params.lr is {peak:g}, which {kind} overrides"
        yield finding(config, "warning", path, message, "Write the same learning rate in both.")
    if low is not None and high is not None and low > high:
        message = f"starts at {low:g}, above the peak of {high:g}: the learning rate would fall during the warm-up"
        yield finding(config, "error", "scheduler.params.warmup_min_lr", message, "Write 0.")
    top = high if high is not None else peak
    if top is not None and top >= 1e-3:
        severity: Severity = "warning"
        where = path if high is not None else "optimizer.params.lr"
        message = f"a peak of {top:g} suits pretraining of small models; full fine-tuning uses 1e-6 to 5e-5"
        yield finding(config, severity, where, message, "Lower it, unless you only train adapters.")


def _lr(config: DsConfig, path: str) -> float | None:
    value = as_number(config.get(path))
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


SCHEDULE_RULES: tuple[Rule, ...] = (_schedule,)

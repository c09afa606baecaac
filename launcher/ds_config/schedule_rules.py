"""The scheduler block: what DeepSpeed's schedulers make of it, which is often not what its author thought."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launcher.ds_config.catalogue import Catalogue
from launcher.ds_config.facts import AUTO, as_number, open_warmup
from launcher.ds_config.findings import Finding, Severity, finding, rewrite
from launcher.ds_config.read import DsConfig
from launcher.errors import nearest

WARMUPS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
DEFAULT_WARMUP_UPDATES = 1000


def schedule_rules(config: DsConfig, keys: Catalogue, *, zero: bool) -> Iterator[Finding]:
    """What is wrong or doubtful in the scheduler block of `config`. `zero`: a ZeRO stage above 0 is on."""
    kind = config.get("scheduler.type")
    if not isinstance(kind, str) or kind == AUTO:
        return
    if kind not in keys.schedulers:
        yield _unknown(config, kind, keys)
        return
    yield from _missing(config, kind, keys)
    if zero and not _is_deepspeeds(kind):
        message = f"{kind} is PyTorch's, and fails on the optimizer that ZeRO wraps"
        yield finding(config, "error", "scheduler.type", message, "Take WarmupDecayLR or WarmupCosineLR.")
    if kind in WARMUPS:
        yield from _warmup(config, kind)
        yield from _rates(config, kind)


def _is_deepspeeds(kind: str) -> bool:
    """Whether a scheduler is one of DeepSpeed's own."""
    return kind in (*WARMUPS, "OneCycle", "LRRangeTest")


def _unknown(config: DsConfig, kind: str, keys: Catalogue) -> Finding:
    close = nearest(kind, keys.schedulers)
    same = [name for name in keys.schedulers if name.lower() == kind.lower()]
    hint = f"Did you mean {same[0] if same else close}?" if same or close else "Take WarmupDecayLR or WarmupCosineLR."
    fix = rewrite(config, "scheduler.type", f'"{same[0]}"') if same else None
    return finding(config, "error", "scheduler.type", f"DeepSpeed knows no scheduler {kind}", hint, fix)


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
        message = "update 0 runs at the optimizer's full rate: a resume sets this by itself"
        yield finding(config, "error", "scheduler.params.last_batch_iteration", message, "Take it out.")


def _too_long(config: DsConfig, updates: Any, total: Any, by_default: bool) -> Finding:
    default = " (the default)" if by_default else ""
    message = f"the warm-up of {updates} updates{default} is not shorter than the run of {total}"
    path = "scheduler.params" if by_default else "scheduler.params.warmup_num_steps"
    hint = "Write warmup_num_steps well below total_num_steps: the rate else falls to its floor at once."
    return finding(config, "error", path, message, hint, unsafe=True)


def _warmup_type(config: DsConfig, params: dict[str, Any], kind: str) -> Iterator[Finding]:
    form = params.get("warmup_type")
    path = "scheduler.params.warmup_type"
    if open_warmup(config):
        if form is None:
            message = "no warmup_type: the launcher fills in linear; transformers' Trainer leaves the steep log ramp"
            yield finding(config, "note", "scheduler.params", message, 'Add "warmup_type": "linear".')
    elif form is None:
        message = "no warmup_type: the default is log, at 35% of the peak after 10 of 1000 updates"
        yield finding(config, "warning", "scheduler.params", message, 'Add "warmup_type": "linear".')
    elif form == "log":
        message = "a log warm-up is steep: 35% of the peak after 10 of 1000 updates"
        yield finding(config, "note", path, message, 'Write "linear" for a gentle one.')
    elif form not in ("linear", AUTO):
        message = f"{form!r} is none of its values, and {kind} takes log in its place"
        yield finding(config, "error", path, message, 'Write "linear".')


def _rates(config: DsConfig, kind: str) -> Iterator[Finding]:
    low, high = (
        _rate(config, "scheduler.params.warmup_min_lr"),
        _rate(config, "scheduler.params.warmup_max_lr"),
    )
    peak = _rate(config, "optimizer.params.lr")
    path = "scheduler.params.warmup_max_lr"
    if kind == "WarmupDecayLR" and config.get(path) is None:
        message = "no warmup_max_lr: WarmupDecayLR then peaks at 1e-3, whatever the optimizer's lr is"
        hint = 'Add "warmup_max_lr", or "warmup_max_lr": "auto".'
        yield finding(config, "error", "scheduler.params", message, hint, unsafe=True)
    if high is not None and peak is not None and high != peak:
        message = f"peaks at {high:g}, while optimizer.params.lr is {peak:g}, which {kind} overrides"
        yield finding(config, "warning", path, message, "Write the same rate in both.")
    if low is not None and high is not None and low > high:
        message = f"starts at {low:g}, above the peak of {high:g}"
        yield finding(config, "error", "scheduler.params.warmup_min_lr", message, "Write 0.")
    top = high if high is not None else peak
    if top is not None and top >= 1e-3:
        severity: Severity = "warning"
        where = path if high is not None else "optimizer.params.lr"
        message = f"a peak of {top:g} suits pretraining of small models; full fine-tuning takes 1e-6 to 5e-5"
        yield finding(config, severity, where, message, "Lower it, unless only adapters are trained.")


def _rate(config: DsConfig, path: str) -> float | None:
    value = as_number(config.get(path))
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

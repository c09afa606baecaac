"""Checks a DeepSpeed JSON before a run: names, types and bounds of keys, and combinations of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

from launcher.ds_config import aliases
from launcher.ds_config.catalogue import Block, Catalogue, Key
from launcher.ds_config.facts import AUTO, as_bool, as_number
from launcher.ds_config.findings import (
    Finding,
    Fix,
    Severity,
    apply_fixes,
    finding,
    rename,
    rewrite,
    shown,
    unambiguous_match,
)
from launcher.ds_config.optimizer_rules import parameters_of, unknown_parameter
from launcher.ds_config.read import DsConfig
from launcher.ds_config.rule_context import RuleContext, context_of
from launcher.ds_config.rules import combinations
from launcher.ds_config.target import Target
from launcher.errors import nearest

__all__ = ["Finding", "Fix", "apply_fixes", "lint"]

_ADAM = "AdamW"
"""The optimizer of a JSON without a type."""
_LARGEST_INT = 2**63
"""From here on pydantic does not accept a float as an int."""
_NOT_CONVERTED = "which DeepSpeed does not convert here; the launcher's plan converts it where it can"
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def lint(config: DsConfig, target: Target, keys: Catalogue) -> list[Finding]:
    """Everything wrong or doubtful in `config` on `target`, by line and column.

    `keys` comes from `load_catalogue`.
    """
    context = context_of(config, target, keys)
    found = [*_block(config, config.data, "", keys), *_params(context)]
    wrong = {f.key_path for f in found if f.severity == "error"}
    found += [f for f in combinations(context) if f.key_path not in wrong]
    return sorted(found, key=lambda f: (f.line, f.column))


def _block(config: DsConfig, data: dict[str, Any], path: str, keys: Catalogue) -> Iterator[Finding]:
    block = keys.blocks[path]
    for name, value in data.items():
        key_path = f"{path}.{name}" if path else name
        if key_path in keys.removed:
            message = "DeepSpeed rejects this key: " + keys.removed[key_path].split(" See http")[0].strip()
            yield finding(config, "error", key_path, message, "Remove it.")
        elif name not in block.keys:
            yield from _unknown(config, key_path, block, keys)
        else:
            yield from _value(config, key_path, value, block.keys[name], block.model)
            yield from _twice(config, key_path, block.keys[name])
            yield from _deprecated(config, key_path, value, block)
            if isinstance(value, dict) and key_path in keys.blocks:
                yield from _block(config, value, key_path, keys)


def _unknown(config: DsConfig, path: str, block: Block, keys: Catalogue) -> Iterator[Finding]:
    name = path.rpartition(".")[2]
    if name.startswith(("_", "$", "//", "#")) and not block.model:
        return
    close, elsewhere = nearest(name, block.names), _elsewhere(path, name, keys)
    if block.open and close is None:
        return
    sure = unambiguous_match(name, block.names)
    message = "DeepSpeed has no such key here, and " + ("fails on it" if block.model else "silently ignores it")
    # An ignored key is an error if it was certainly meant to have an effect.
    severity: Severity = "error" if block.model or sure or elsewhere else "warning"
    if elsewhere and sure is None:
        yield finding(config, severity, path, message, f"Use {elsewhere}.")
    elif close:
        yield finding(
            config,
            severity,
            path,
            message,
            f"Did you mean {close}?",
            rename(config, path, sure) if sure else None,
        )
    else:
        yield finding(config, severity, path, message, "Remove it, or check its name.")


def _elsewhere(path: str, name: str, keys: Catalogue) -> str | None:
    """The right path of a key that is at the wrong level or has another tool's name."""
    if "." not in path and name in aliases.KEYS:
        return aliases.KEYS[name]
    homes = [home for home, block in keys.blocks.items() if name in block.names and name != "enabled"]
    return f"{homes[0]}.{name}".lstrip(".") if len(homes) == 1 else None


def _twice(config: DsConfig, path: str, key: Key) -> Iterator[Finding]:
    """A key under both of its names, such as stage3_prefetch_bucket_size and prefetch_bucket_size."""
    other = f"{path.rpartition('.')[0]}.{key.alias}"
    if key.alias is not None and config.get(other, config) is not config:
        message = f"another name of {key.alias}, which is set too: DeepSpeed fails on both"
        yield finding(config, "error", path, message, "Remove this one.")


def _deprecated(config: DsConfig, path: str, value: Any, found_in: Block) -> Iterator[Finding]:
    block, _, name = path.rpartition(".")
    key, fix = found_in.keys[name], None
    if key.deprecated is None:
        return
    new = found_in.keys.get(key.deprecated)
    new_name = (new.alias if new else None) or key.deprecated
    switched_off = name in ("cpu_offload", "cpu_offload_param") and not as_bool(value)
    if name in ("cpu_offload", "cpu_offload_param") and as_bool(value):
        fix = _offload_fix(config, path, key.deprecated)
    elif name == "stage3_gather_fp16_weights_on_model_save":
        fix = rename(config, path, "stage3_gather_16bit_weights_on_model_save")
    hint = f"Use {new_name} instead." if new_name and not switched_off else "Remove it."
    if any(config.get(f"{block}.{other}") is not None for other in (key.deprecated, new_name)):
        message = f"deprecated, and DeepSpeed fails if {new_name} is set too"
        yield finding(config, "error", path, message, "Remove this one.")
    else:
        yield finding(config, "warning", path, "deprecated by DeepSpeed", hint, fix)


def _offload_fix(config: DsConfig, path: str, new_name: str) -> Fix | None:
    name = rename(config, path, new_name)
    value = rewrite(config, path, '{"device": "cpu"}')
    if name is None or value is None or config.text is None:
        return None
    between = config.text[name.end : value.start]
    return Fix(name.start, value.end, name.replacement + between + value.replacement)


def _params(context: RuleContext) -> Iterator[Finding]:
    """The params of optimizer and scheduler, which are arguments of their classes."""
    config = context.config
    for name in ("optimizer", "scheduler"):
        written, params = config.get(f"{name}.type"), config.get(f"{name}.params")
        block = _class_of(name, written, context)
        if block is None or not isinstance(params, dict):
            continue
        for key, value in params.items():
            path = f"{name}.params.{key}"
            if key not in block.keys or key == "max_grad_norm":
                yield _unknown_param(context, name, written, key, block)
            # A scheduler accepts a list for some numbers: one per parameter group.
            elif name == "optimizer" or not isinstance(value, list) or "list" in block.keys[key].types:
                yield from _value(config, path, value, block.keys[key], False)


def _unknown_param(context: RuleContext, name: str, written: str, key: str, block: Block) -> Finding:
    if name == "optimizer":
        return unknown_parameter(context, _ADAM if written in (None, AUTO) else written, key, block)
    alias = aliases.scheduler_param(written, key)
    close, sure = nearest(key, block.names), None if alias else unambiguous_match(key, block.names)
    guess = f"Did you mean {close}?" if close else f"It accepts {', '.join(sorted(block.names))}."
    path = f"scheduler.params.{key}"
    fix = rename(context.config, path, sure) if sure else None
    return finding(
        context.config, "error", path, f"{written} has no such parameter and fails on it", alias or guess, fix
    )


def _class_of(name: str, written: Any, context: RuleContext) -> Block | None:
    if name == "scheduler":
        return context.keys.schedulers.get(written) if isinstance(written, str) else None
    written = _ADAM if written in (None, AUTO) else written
    return parameters_of(context, written) if isinstance(written, str) else None


def _value(config: DsConfig, path: str, value: Any, key: Key, model: bool) -> Iterator[Finding]:
    """Type, choices and bounds of one value. `model`: DeepSpeed converts text to numbers and booleans."""
    if value == AUTO or not key.types or "any" in key.types:
        return
    if isinstance(value, str) and "str" not in key.types:
        yield from _text(config, path, value, key, model)
        return
    problem = _type_problem(value, key)
    if problem:
        yield finding(config, "error", path, problem, aliases.value(path, value) or f"Write {_expected(key)}.")
    elif key.choices and value not in key.choices:
        choices = [str(choice) for choice in key.choices]
        close, sure = nearest(str(value), choices), unambiguous_match(str(value), choices)
        guess = f"Did you mean {close}?" if close else f"Use one of {', '.join(choices)}."
        hint = aliases.value(path, value) or guess
        fix = rewrite(config, path, f'"{sure}"') if sure and isinstance(value, str) else None
        yield finding(config, "error", path, f"{shown(value)} is not an allowed value", hint, fix)
    else:
        yield from _bounds(config, path, value, key)


def _text(config: DsConfig, path: str, value: str, key: Key, model: bool) -> Iterator[Finding]:
    """Text instead of another type: a quoted number, Python's True, or something invalid."""
    word, number = value.rstrip(",").strip(), as_number(value.rstrip(",").strip())
    truth = as_bool(word) if "bool" in key.types else None
    if truth is not None or ("null" in key.types and word in ("None", "null")):
        harmless = model and as_bool(value) is not None
        right = PYTHON_WORDS[str(truth)]
        message = f"found the text {value!r} instead of {right}" + ("" if harmless else ", which DeepSpeed misreads")
        fix = rewrite(config, path, right)
        yield finding(config, "note" if harmless else "error", path, message, f"Write {right}.", fix)
    elif not isinstance(number, str) and {"int", "float"} & set(key.types):
        problem = _type_problem(number, key)
        harmless = model and not problem and _is_pydantic_int(value, key)
        message = f"a number in quotes, {value!r}" + ("" if harmless else f", {_NOT_CONVERTED}")
        fix = rewrite(config, path, word if not harmless or "e" not in word else shown(number))
        yield finding(config, "note" if harmless else "error", path, message, f"Write {word} without quotes.", fix)
    else:
        yield finding(config, "error", path, f"found {value!r}", f"Write {_expected(key)}.")


def _is_pydantic_int(text: str, key: Key) -> bool:
    """pydantic converts "5" to an int, but not "1e6"."""
    return "float" in key.types or text.strip().lstrip("+-").isdigit()


def _type_problem(value: Any, key: Key) -> str | None:
    kind = "null" if value is None else type(value).__name__
    if isinstance(value, float) and not math.isfinite(value):
        return None if "inf" in key.types and value > 0 else f"found {shown(value)}, which is not valid JSON"
    if kind in key.types or (kind == "int" and "float" in key.types):
        return None
    if isinstance(value, float) and "int" in key.types and value.is_integer() and abs(value) < _LARGEST_INT:
        return None
    if kind == "int" and "bool" in key.types and "dict" not in key.types and value in (0, 1):
        return None
    counted = isinstance(value, bool) and {"int", "float"} & set(key.types)
    return f"found {shown(value)}" + (f", which DeepSpeed reads as the number {int(value)}" if counted else "")


def _expected(key: Key) -> str:
    words = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "str": "text",
        "list": "a list […]",
        "dict": "a block {…}",
        "null": "null",
    }
    kinds = [words[kind] for kind in key.types if kind in words and not (kind == "int" and "float" in key.types)]
    return " or ".join(kinds)


def _bounds(config: DsConfig, path: str, value: Any, key: Key) -> Iterator[Finding]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    checks = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for name, bound in key.bounds.items():
        if not checks[name](value, bound):
            yield finding(config, "error", path, f"{value} is out of bounds", f"It must be {words[name]} {bound:g}.")

"""What lint finds in a JSON that is about to be used: errors refuse it, warnings are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.ds_config.case import case_of
from launcher.ds_config.catalogue import Catalogue, Key
from launcher.ds_config.facts import BATCH_KEYS, as_number
from launcher.ds_config.findings import Finding
from launcher.ds_config.lint import lint
from launcher.ds_config.optimizer_rules import parameters_of
from launcher.ds_config.read import DsConfig
from launcher.ds_config.target import Target
from launcher.errors import Problem, RequestError

_CONVERTED = (*BATCH_KEYS, "gradient_clipping", "steps_per_print", "optimizer.params.", "scheduler.params.")
"""Where `compose` turns numbers in quotes into numbers, and says so."""


def approve(
    config: DsConfig,
    target: Target,
    keys: Catalogue,
    *,
    replaced: tuple[str, ...] = (),
    allow_unsafe: bool = False,
) -> tuple[str, ...]:
    """The warnings about `config` that a plan does not answer by itself, each with its line and hint.

    `replaced` are blocks that the launcher writes itself, so that their contents do not count; `allow_unsafe` accepts
    what runs and is not safe. Raises RequestError with every error.
    """
    found = [one for one in lint(config, target, keys) if not one.key_path.startswith(replaced)]
    taken = [one for one in found if _converted(config, one) or (one.unsafe and allow_unsafe)]
    errors = [one for one in found if one.severity == "error" and one not in taken]
    if errors:
        raise RequestError(*(_problem(config, one) for one in errors))
    told = [one for one in found if (one.severity == "warning" and not one.filled) or (one.unsafe and allow_unsafe)]
    return tuple(str(_problem(config, one)) for one in told)


def approve_completed(
    user: DsConfig,
    completed: Mapping[str, Any],
    target: Target,
    keys: Catalogue,
    *,
    replaced: tuple[str, ...] = (),
    allow_unsafe: bool = False,
) -> None:
    """Raises RequestError where what a plan filled in goes wrong with what the user wrote, at the user's own key."""
    config = replace(user, data=dict(completed))
    approve(config, target, keys, replaced=replaced, allow_unsafe=allow_unsafe)


def refuse_untaken(config: DsConfig, asked: Mapping[str, Any], target: Target, keys: Catalogue) -> None:
    """Raises RequestError for what a job `asked` of the optimizer (parameter: value) that the JSON's does not take.

    A type whose parameters are not known is believed to take them all.
    """
    written = config.get("optimizer.type")
    block = parameters_of(case_of(config, target, keys), written) if isinstance(written, str) else None
    if block is None:
        return
    hint = f"leave it out, or set in {config.origin} what {written} has: {', '.join(sorted(block.names))}"
    problems = [
        Problem(f"{written} does not take it", key=f"train.{name}", hint=hint)
        for name, value in asked.items()
        if name not in block.keys or not _of_type(value, block.keys[name])
    ]
    if problems:
        raise RequestError(*problems)


def _of_type(value: Any, key: Key) -> bool:
    return not key.types or bool({"any", type(value).__name__} & set(key.types))


def _converted(config: DsConfig, found: Finding) -> bool:
    value = config.get(found.key_path)
    return found.key_path.startswith(_CONVERTED) and isinstance(value, str) and not isinstance(as_number(value), str)


def _problem(config: DsConfig, found: Finding) -> Problem:
    return config.problem(found.key_path, found.message, found.hint)

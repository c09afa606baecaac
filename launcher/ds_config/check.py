"""Runs lint on a JSON that a plan uses: raises the errors, returns the warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.ds_config.catalogue import Catalogue, Key
from launcher.ds_config.facts import BATCH_KEYS, as_number
from launcher.ds_config.findings import Finding
from launcher.ds_config.lint import lint
from launcher.ds_config.optimizer_rules import parameters_of
from launcher.ds_config.read import DsConfig
from launcher.ds_config.rule_context import context_of
from launcher.ds_config.target import Target
from launcher.errors import Problem, RequestError

_CONVERTED = (*BATCH_KEYS, "gradient_clipping", "steps_per_print", "optimizer.params.", "scheduler.params.")
"""Where `compose` converts quoted numbers and records the change."""


def check_config(
    config: DsConfig,
    target: Target,
    keys: Catalogue,
    *,
    replaced: tuple[str, ...] = (),
    allow_unsafe: bool = False,
) -> tuple[str, ...]:
    """The warnings about `config` that the plan does not resolve, each with its line and hint.

    `replaced`: blocks that the launcher replaces, and whose contents are not checked. `allow_unsafe`: unsafe findings
    are warnings. Raises RequestError with all errors.
    """
    found = [one for one in lint(config, target, keys) if not one.key_path.startswith(replaced)]
    accepted = [one for one in found if _converted(config, one) or (one.unsafe and allow_unsafe)]
    errors = [one for one in found if one.severity == "error" and one not in accepted]
    if errors:
        raise RequestError(*(_problem(config, one) for one in errors))
    reported = [one for one in found if (one.severity == "warning" and not one.filled) or (one.unsafe and allow_unsafe)]
    return tuple(str(_problem(config, one)) for one in reported)


def check_completed_config(
    user: DsConfig,
    completed: Mapping[str, Any],
    target: Target,
    keys: Catalogue,
    *,
    replaced: tuple[str, ...] = (),
    allow_unsafe: bool = False,
) -> None:
    """Raises RequestError if values that the plan filled in conflict with what the user wrote, at the user's key."""
    config = replace(user, data=dict(completed))
    check_config(config, target, keys, replaced=replaced, allow_unsafe=allow_unsafe)


def check_optimizer_keys(config: DsConfig, requested: Mapping[str, Any], target: Target, keys: Catalogue) -> None:
    """Raises RequestError for parameters `requested` in the job that the JSON's optimizer does not accept.

    A type with unknown parameters is assumed to accept all of them.
    """
    written = config.get("optimizer.type")
    block = parameters_of(context_of(config, target, keys), written) if isinstance(written, str) else None
    if block is None:
        return
    hint = f"remove it, or set a parameter of {written} in {config.origin}: {', '.join(sorted(block.names))}"
    problems = [
        Problem(f"{written} does not accept it", key=f"train.{name}", hint=hint)
        for name, value in requested.items()
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

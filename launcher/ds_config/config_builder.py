"""Builds a DeepSpeed JSON from the user's and records every change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.ds_config.facts import AUTO, as_number, has_auto
from launcher.ds_config.read import DsConfig
from launcher.errors import Problem, RequestError


@dataclass(frozen=True)
class Change:
    """One key whose value differs from the user's JSON. `before` is None if missing, `after` if removed."""

    key_path: str
    before: Any
    after: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key_path}: {_shown(self.before)} → {_shown(self.after)}  ({self.reason})"


class ConfigBuilder:
    """The config so far, with the changes and problems so far."""

    def __init__(self, user: DsConfig) -> None:
        self.user = user
        self.config: dict[str, Any] = copy.deepcopy(user.data)
        self.changes: list[Change] = []
        self.problems: list[Problem] = []

    def run(self, step: Callable[[ConfigBuilder], None]) -> None:
        """Runs `step` on this builder and collects the problems that it raises."""
        try:
            step(self)
        except RequestError as error:
            self.problems.extend(error.problems)

    def get(self, path: str) -> Any:
        """The value at a dotted path; None if it is missing."""
        node: Any = self.config
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return node

    def set(self, path: str, value: Any, reason: str) -> None:
        """Sets `path`, creates missing blocks on the way, and records the change."""
        *blocks, last = path.split(".")
        node = self.config
        for depth, key in enumerate(blocks):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                block = ".".join(blocks[: depth + 1])
                raise RequestError(self.user.problem(block, f"expected a block {{…}}, found {node!r}"))
        before = node.get(last)
        if last not in node or type(before) is not type(value) or before != value:
            node[last] = copy.deepcopy(value)
            self.changes.append(Change(path, before, copy.deepcopy(value), reason))

    def remove(self, path: str, reason: str) -> None:
        """Removes a key and records the change. A key whose name contains a dot has no path, and stays."""
        block, _, last = path.rpartition(".")
        node = self.get(block) if block else self.config
        if not isinstance(node, dict) or last not in node:
            return
        self.changes.append(Change(path, node.pop(last), None, reason))

    def fill(self, path: str, value: Any, job_key: str, explicit: bool, reason: str) -> None:
        """Fills a missing or "auto" key. A value that contradicts an explicit one of the job is a problem."""
        found = self.get(path)
        if isinstance(found, list) and isinstance(value, list) and len(found) == len(value) and has_auto(found):
            filled = [new if old == AUTO else old for old, new in zip(found, value, strict=True)]
            self.set(path, filled, reason)
            found = filled
        if found is None or found == AUTO:
            self.set(path, value, reason)
        elif as_number(found) == value or not explicit:
            self.convert_number(path)
        else:
            message = f"{found!r} here, but {job_key} in the job is {value!r}"
            hint = f'Set one of the two, or write "auto" here to take the job\'s {value!r}.'
            self.problems.append(self.user.problem(path, message, hint))

    def convert_number(self, path: str) -> None:
        """Converts a number written as text: DeepSpeed converts it only in its pydantic models."""
        found = self.get(path)
        if isinstance(found, str) and as_number(found) is not found:
            self.set(path, as_number(found), "a number written as text, which DeepSpeed does not convert here")


def _shown(value: Any) -> str:
    return "(not set)" if value is None else repr(value)

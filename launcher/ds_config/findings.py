"""A finding of lint: location, severity, hint, and the edit that fixes it if only one is possible."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from launcher.ds_config.read import DsConfig

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Fix:
    """Replaces the characters `start` to `end` of the text by `replacement`."""

    start: int
    end: int
    replacement: str


@dataclass(frozen=True)
class Finding:
    """One thing to fix. Lines and columns count from 1; 0 if there is no text (an inline mapping).

    error: DeepSpeed fails, or does not train what the user wants. warning: it runs, but probably hurts. note: worth
    knowing. `unsafe`: it runs, and schedule.allow_unsafe in a job allows it. `filled`: the plan sets the missing value.
    """

    line: int
    column: int
    severity: Severity
    key_path: str
    message: str
    hint: str
    fix: Fix | None = None
    unsafe: bool = False
    filled: bool = False


def finding(
    config: DsConfig,
    severity: Severity,
    path: str,
    message: str,
    hint: str,
    fix: Fix | None = None,
    *,
    unsafe: bool = False,
    filled: bool = False,
) -> Finding:
    """A finding at the location of `path` in `config`."""
    location = config.location(path)
    line, column = (location.line, location.column) if location else (0 if config.text is None else 1,) * 2
    return Finding(line, column, severity, path, message, hint, fix, unsafe, filled)


def rename(config: DsConfig, path: str, name: str) -> Fix | None:
    """The edit that renames the key at `path`; None if the new name exists already."""
    location = config.locations.get(path)
    block = path.rpartition(".")[0]
    taken = config.get(f"{block}.{name}" if block else name, config) is not config
    if config.text is None or location is None or location.key_start < 0 or taken:
        return None
    quote = config.text[location.key_start]
    quote = quote if quote in "\"'" else ""
    return Fix(location.key_start, location.key_end, f"{quote}{name}{quote}")


def rewrite(config: DsConfig, path: str, value: str) -> Fix | None:
    """The edit that replaces the value at `path` by the JSON text `value`."""
    location = config.locations.get(path)
    if config.text is None or location is None or location.value_start < 0:
        return None
    # hjson reads a comma after unquoted text as part of the text.
    written = config.text[location.value_start : location.value_end]
    comma = "," if written.endswith(",") else ""
    return Fix(location.value_start, location.value_end, value + comma)


_OPPOSITES = (("min", "max"), ("read", "write"), ("first", "second"), ("param", "optimizer"), ("weights", "gradients"))


def unambiguous_match(name: str, valid: Iterable[str]) -> str | None:
    """The only valid name that is close enough to `name` to be certain, or None.

    Pairs that differ in a few letters but mean different things, such as min and max or fp16 and bf16, never match.
    """
    names = list(valid)
    same = [known for known in names if known.lower() == name.lower()]
    matches = same or difflib.get_close_matches(name, names, n=2, cutoff=0.85)
    return matches[0] if len(matches) == 1 and not _opposed(name.lower(), matches[0].lower()) else None


def _opposed(name: str, match: str) -> bool:
    words, others = set(name.split("_")), set(match.split("_"))
    pairs = (*_OPPOSITES, *((two, one) for one, two in _OPPOSITES))
    swapped = any(one in words - others and two in others - words for one, two in pairs)
    return swapped or name[:1] != match[:1] or ("bf" in name) != ("bf" in match)


def applicable_fixes(findings: Iterable[Finding]) -> list[tuple[Finding, Fix]]:
    """The fixes that can be applied together, in text order; of two that overlap, the first."""
    fixes = {one.fix: one for one in findings if one.fix is not None}
    applicable, at = [], 0
    for fix in sorted(fixes, key=lambda fix: (fix.start, fix.end)):
        if fix.start >= at:
            applicable.append((fixes[fix], fix))
            at = fix.end
    return applicable


def apply_fixes(text: str, findings: Iterable[Finding]) -> str:
    """`text` with the fixes applied; comments and layout stay."""
    parts, at = [], 0
    for _, fix in applicable_fixes(findings):
        parts += [text[at : fix.start], fix.replacement]
        at = fix.end
    return "".join(parts) + text[at:]


def shown(value: Any) -> str:
    """A value as JSON text, shortened."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"

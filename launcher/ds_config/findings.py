"""What lint finds: where, how bad, how to fix it, and the edit that fixes it where there is just one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from launcher.ds_config.read import DsConfig

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Fix:
    """Characters `start` to `end` of the text become `replacement`."""

    start: int
    end: int
    replacement: str


@dataclass(frozen=True)
class Finding:
    """One thing to fix. Lines and columns count from 1; 0 where the text is not known (an inline mapping).

    error: DeepSpeed fails, or trains something else than was asked for. warning: it runs, and probably hurts.
    note: worth knowing. `unsafe`: it runs as written, and schedule.allow_unsafe in a job takes it. `filled`: a plan
    writes what is missing here.
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
    """A finding at the place of `path` in `config`."""
    place = config.place(path)
    line, column = (place.line, place.column) if place else (0 if config.text is None else 1,) * 2
    return Finding(line, column, severity, path, message, hint, fix, unsafe, filled)


def rename(config: DsConfig, path: str, name: str) -> Fix | None:
    """The edit that gives the key at `path` another name; None where the new name stands there already."""
    place = config.places.get(path)
    block = path.rpartition(".")[0]
    taken = config.get(f"{block}.{name}" if block else name, config) is not config
    if config.text is None or place is None or place.key_start < 0 or taken:
        return None
    quote = config.text[place.key_start]
    quote = quote if quote in "\"'" else ""
    return Fix(place.key_start, place.key_end, f"{quote}{name}{quote}")


def rewrite(config: DsConfig, path: str, value: str) -> Fix | None:
    """The edit that puts the JSON text `value` in the place of the value at `path`."""
    place = config.places.get(path)
    if config.text is None or place is None or place.value_start < 0:
        return None
    # hjson takes a comma after unquoted text as part of it.
    written = config.text[place.value_start : place.value_end]
    comma = "," if written.endswith(",") else ""
    return Fix(place.value_start, place.value_end, value + comma)


_OPPOSITES = (("min", "max"), ("read", "write"), ("first", "second"), ("param", "optimizer"), ("weights", "gradients"))


def sure_match(name: str, valid: Iterable[str]) -> str | None:
    """The one valid name so close to `name` that nothing else can have been meant, or None.

    A few letters make another word of some: min and max, fp16 and bf16. Those are never taken for each other.
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


def made_fixes(findings: Iterable[Finding]) -> list[tuple[Finding, Fix]]:
    """The fixes that can be made together, in the order of the text: of two that overlap the first."""
    fixes = {one.fix: one for one in findings if one.fix is not None}
    made, at = [], 0
    for fix in sorted(fixes, key=lambda fix: (fix.start, fix.end)):
        if fix.start >= at:
            made.append((fixes[fix], fix))
            at = fix.end
    return made


def apply_fixes(text: str, findings: Iterable[Finding]) -> str:
    """`text` with the fixes made: comments and layout stay."""
    parts, at = [], 0
    for _, fix in made_fixes(findings):
        parts += [text[at : fix.start], fix.replacement]
        at = fix.end
    return "".join(parts) + text[at:]


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"

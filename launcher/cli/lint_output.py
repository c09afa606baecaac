"""The findings of `launcher lint`, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher.ds_config.findings import Finding
from launcher.ds_config.lint_files import Linted
from launcher.watch.terminal_safe import plain

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def findings_json(found: dict[str, Linted]) -> str:
    """The findings and fixes of every file as JSON."""
    rows: list[dict[str, Any]] = []
    for path, linted in found.items():
        for line, column, key, before, after in linted.fixed:
            place = {"file": path, "line": line, "column": column, "severity": "fixed", "key_path": key}
            rows.append({**place, "before": before, "after": after})
        rows += [{"file": path, **asdict(finding), "fix": finding.fix is not None} for finding in linted.findings]
    return json.dumps(rows, indent=2)


def print_findings(found: dict[str, Linted], device: str) -> None:
    """Prints the findings and fixes of every file, and a count of each."""
    console = Console(soft_wrap=True, highlight=False)
    for path, linted in found.items():
        for number, _, _, before, after in linted.fixed:
            change = plain(f": {before} → {after}")
            console.print(Text(f"{path}:{number}: ").append("fixed", style="green").append(change))
        for finding in linted.findings:
            line = Text(_place(path, finding))
            line.append(finding.severity, style=COLOURS[finding.severity])
            line.append(plain(": " + ": ".join(part for part in (finding.key_path, finding.message) if part)))
            line.append(f"\n    {plain(finding.hint)}" if finding.hint else "")
            line.append(" (--fix writes it)" if finding.fix else "", style="green")
            console.print(line)
    console.print(_summary(found, device))


def _place(path: str, finding: Finding) -> str:
    """File, line and column, as far as they are known."""
    return ":".join(str(part) for part in (path, finding.line, finding.column) if part) + ": "


def _summary(found: dict[str, Linted], device: str) -> str:
    severities: list[str] = [finding.severity for linted in found.values() for finding in linted.findings]
    files = f"{len(found)} file" + ("s" if len(found) != 1 else "")
    fixed = sum(len(linted.fixed) for linted in found.values())
    prefix = f"{fixed} fixed, " if fixed else ""
    if not severities:
        return f"{files}: {prefix}nothing to fix (for {device})"
    counts = [f"{severities.count(name)} {name}" + "s" * (severities.count(name) != 1) for name in COLOURS]
    return f"{files}: {prefix}" + ", ".join(counts) + f" (for {device})"

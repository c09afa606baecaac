"""Reading a plan from its file."""

from __future__ import annotations

from pathlib import Path

from launcher.plan.schema import Plan


def read_plan(file: Path) -> Plan:
    """The plan in a file, as `Plan.from_json`. Raises LauncherError, naming the file, and OSError."""
    # What is not UTF-8 is not a plan either: it is reported like any other damage.
    return Plan.from_json(file.read_bytes().decode(errors="replace"), str(file))

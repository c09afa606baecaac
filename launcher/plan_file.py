"""Reads a plan from its file."""

from __future__ import annotations

from pathlib import Path

from launcher.plan.schema import Plan


def read_plan(file: Path) -> Plan:
    """The plan in a file. Raises OSError, and LauncherError with the file's name if the plan is damaged."""
    # Invalid UTF-8 is replaced, so that it is reported like any other damage.
    return Plan.from_json(file.read_bytes().decode(errors="replace"), str(file))

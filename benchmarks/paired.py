"""Measurements of two alternatives in turn, each in a process of its own, and their paired ratios."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from statistics import median


def measured(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """The figures that a command prints as JSON on its last line. Ends the benchmark if the command fails."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio_text(first: Sequence[float], second: Sequence[float], scale: float) -> str:
    """The medians of both, divided by `scale`, and the median, least and largest of the paired ratios."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return (
        f"{median(first) / scale:.4g} -> {median(second) / scale:.4g}, "
        f"ratio {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )

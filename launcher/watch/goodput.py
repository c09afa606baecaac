"""The part of a run's time that its updates took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.run_dir import ENDED, RunDir
from launcher.watch.run_session import number_of, seconds_of


@dataclass(frozen=True)
class Goodput:
    """`seconds` in which launchers carried out the run, and how many of them its updates took.

    Repeated updates count once; evaluations, checkpoints, starts and restarts do not count as updates.
    """

    seconds: float
    useful_seconds: float

    @property
    def share(self) -> float:
        return min(1.0, self.useful_seconds / self.seconds)


def goodput(run: RunDir) -> Goodput | None:
    """The goodput of a run; None before its first update."""
    useful = sum(number_of(line.get("step_seconds")) or 0.0 for line in run.metrics())
    seconds = _carried_out(run.events())
    return Goodput(seconds, useful) if useful and seconds else None


def _carried_out(events: Iterable[Mapping[str, Any]]) -> float:
    """The seconds from the first event to the last, without those between an end of the run and its resume."""
    total, before = 0.0, None
    for event in events:
        now = seconds_of(event.get("time"))
        if now is None:
            continue
        if before is not None and event.get("event") != "resume":
            total += max(0.0, now - before)
        before = None if event.get("state") in ENDED else now
    return total

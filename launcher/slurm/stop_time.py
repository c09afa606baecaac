"""How long a run needs to save and stop, and how long before the time limit Slurm must signal for that."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.job.schema import SlurmSection
from launcher.job.slurm import time_seconds
from launcher.run_dir import RunDir
from launcher.watch.run_session import number_of, seconds_of
from launcher.watch.status import recent_metrics

_RECENT_UPDATES = 20
_MARGIN = 1.5
_MAX_SIGNAL_SECONDS = 65535
"""Source: sbatch(1), --signal."""


@dataclass(frozen=True)
class StopTime:
    """How long a run takes to stop, in seconds: it ends its update, and saves."""

    update: float
    save: float

    @property
    def total(self) -> float:
        return self.update + self.save


def read_stop_time(run: RunDir) -> StopTime | None:
    """The slowest of the run's last updates, and its last save; None if the run has saved nothing."""
    began: float | None = None
    save: float | None = None
    for event in run.events():
        if event.get("state") == "saving":
            began = seconds_of(event.get("time"))
        elif event["event"] == "checkpoint" and began is not None and (end := seconds_of(event.get("time"))):
            save, began = end - began, None
    if save is None:
        return None
    updates = [number_of(line.get("step_seconds")) or 0.0 for line in recent_metrics(run)[-_RECENT_UPDATES:]]
    return StopTime(max(updates, default=0.0), save)


def needed_signal_seconds(slurm: SlurmSection, stop: StopTime | None) -> int:
    """`slurm.signal_seconds`, or more if the run takes longer to stop: then with a margin, if the time limit allows."""
    if stop is None or stop.total <= slurm.signal_seconds:
        return slurm.signal_seconds
    limit = (time_seconds(slurm.time) if slurm.time else None) or 2 * _MAX_SIGNAL_SECONDS
    wanted = min(math.ceil(_MARGIN * stop.total), limit // 2, _MAX_SIGNAL_SECONDS)
    return max(slurm.signal_seconds, wanted)


def describe_late_signal(slurm: SlurmSection, stop: StopTime) -> str:
    """Why the signal comes too late for the run."""
    return (
        f"the last save took {stop.save:.0f} s and an update {stop.update:.0f} s, but Slurm signals only "
        f"{slurm.signal_seconds} s before the time limit (slurm.signal_seconds)"
    )

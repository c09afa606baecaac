"""Useful updates per second of a run that loses a rank every N updates, compared with a run without failures.

Both runs make the same updates on two CPU ranks, in turn. Only the time from the first update to the last is compared,
so the cold start, which both have, does not count. A rank is killed with SIGKILL.

The two runs take place at different times, at which the machine may be differently fast. So the share of useful time is
printed too, from the run with failures alone: the time of the updates that count (the step_seconds in metrics.jsonl,
without those that were made again) in the time from the first update to the last.

    python benchmarks/goodput.py [--updates 3000] [--every 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.recovery import Run, running, write_job

TARGET = 0.9


@dataclass(frozen=True)
class Times:
    """Seconds from the first to the last update, and the seconds of the updates that count."""

    wall: float
    useful: float


def times_of(job: Path, folder: Path, updates: int, kill_every: int | None) -> Times:
    """The times of a run in which a rank is killed after every `kill_every` new updates."""
    with running(Run(job, folder)) as run:
        first = run.wait_for(lambda: run.updates() >= 1)
        for made in range(kill_every, updates, kill_every) if kill_every else ():
            run.wait_for(lambda made=made: run.updates() >= made)  # type: ignore[misc]
            run.kill_a_rank()
        wall = run.wait_for(lambda: run.updates() >= updates) - first
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()[1:updates]
        return Times(wall, sum(json.loads(line)["step_seconds"] for line in lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    ratios: list[float] = []
    useful: list[float] = []
    with tempfile.TemporaryDirectory(prefix="goodput-") as name:
        folder = Path(name)
        # The run is ended after the last update, so it never makes its own last one.
        job = write_job(folder, updates=options.updates + 100, save_every=50)
        for _ in range(options.rounds):
            ideal = times_of(job, folder, options.updates, None)
            failing = times_of(job, folder, options.updates, options.every)
            ratios.append(ideal.wall / failing.wall)
            useful.append(failing.useful / failing.wall)
            print(
                f"without failures {ideal.wall:6.1f} s, useful {ideal.useful / ideal.wall:.3f}   "
                f"with {failing.wall:6.1f} s, useful {useful[-1]:.3f}   goodput {ratios[-1]:.2f}",
                flush=True,
            )
    print(
        f"a rank killed every {options.every} updates: median goodput {median(ratios):.2f} (target: {TARGET}), "
        f"share of useful time {median(useful):.3f}"
    )


if __name__ == "__main__":
    main()

"""Useful updates per second of a run that loses a rank every N updates, compared with a run without failures.

Both runs make the same updates on two CPU ranks, in turn. Only the time from the first update to the last is compared,
so the cold start, which both have, does not count. A rank is killed with SIGKILL.

    python benchmarks/goodput.py [--updates 3000] [--every 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.recovery import Run, running, write_job

TARGET = 0.9


def seconds_of(job: Path, folder: Path, updates: int, kill_every: int | None) -> float:
    """Seconds from the first to the last update; a rank is killed after every `kill_every` new updates."""
    with running(Run(job, folder)) as run:
        first = run.wait_for(lambda: run.updates() >= 1)
        for made in range(kill_every, updates, kill_every) if kill_every else ():
            run.wait_for(lambda made=made: run.updates() >= made)  # type: ignore[misc]
            run.kill_a_rank()
        return run.wait_for(lambda: run.updates() >= updates) - first


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    ratios = []
    with tempfile.TemporaryDirectory(prefix="goodput-") as name:
        folder = Path(name)
        # The run is ended after the last update, so it never makes its own last one.
        job = write_job(folder, updates=options.updates + 100, save_every=50)
        for _ in range(options.rounds):
            ideal = seconds_of(job, folder, options.updates, None)
            failing = seconds_of(job, folder, options.updates, options.every)
            ratios.append(ideal / failing)
            print(f"without failures {ideal:6.1f} s   with {failing:6.1f} s   goodput {ratios[-1]:.2f}", flush=True)
    print(f"median goodput {median(ratios):.2f}, a rank killed every {options.every} updates (target: {TARGET})")


if __name__ == "__main__":
    main()

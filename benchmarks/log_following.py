"""The lag of `launcher logs -f` behind a live run, and its CPU use.

A separate process writes lines to rank logs at a fixed rate, one write per line, like agents. The real command follows
them into a pipe, and the arrival of each line is compared with the time in it. Its CPU time is measured over the same
period. The command holds lines back for half a second to put those of slower files in order: that is the minimum lag.

    python benchmarks/log_following.py [--files 64] [--rate 10] [--seconds 20]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil

from launcher.run_dir import RunDir, utc_now

RANKS_PER_NODE = 8
_START_SECONDS = 4.0


@dataclass(frozen=True)
class Measured:
    """Lags in seconds, sorted; `misplaced` lines were older than the line before them."""

    lags: tuple[float, ...]
    written: int
    misplaced: int
    core: float

    def lag(self, share: float) -> float:
        return self.lags[min(len(self.lags) - 1, int(share * len(self.lags)))]


def write_lines(folder: Path, files: int, rate: float, seconds: float) -> None:
    """Writes `rate` lines per second to each file, in turn. Runs in a separate process."""
    logs = []
    for rank in range(files):
        path = folder / f"logs/node-{rank // RANKS_PER_NODE}-h{rank // RANKS_PER_NODE}/rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        logs.append(path.open("ab", buffering=0))
    start, pause = time.monotonic(), 1 / (files * rate)
    for number in range(int(seconds * rate * files)):
        wait = start + number * pause - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        logs[number % files].write(f"{utc_now()} line {number} of a rank that prints this much\n".encode())


def measure(files: int, rate: float, seconds: float) -> Measured:
    """Follows the logs of a run while another process writes to them."""
    with tempfile.TemporaryDirectory() as name:
        run = RunDir(Path(name))
        run.logs.mkdir()
        run.enter("training")
        writer = subprocess.Popen([sys.executable, __file__, "--write", name, *map(str, (files, rate, seconds))])
        command = [str(Path(sys.executable).with_name("launcher")), "logs", name, "-f", "--tail", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as follower:
            arrivals: list[tuple[float, float]] = []
            reader = threading.Thread(target=_read, args=(follower, arrivals))
            reader.start()
            time.sleep(_START_SECONDS)
            process, start = psutil.Process(follower.pid), time.monotonic()
            before = sum(process.cpu_times()[:2])
            writer.wait()
            busy = sum(process.cpu_times()[:2]) - before
            core = busy / (time.monotonic() - start)
            run.enter("finished")
            reader.join()
    settled = [(written, arrived) for written, arrived in arrivals if written >= arrivals[0][1]]
    lags = tuple(sorted(arrived - written for written, arrived in settled))
    misplaced = sum(b[0] < a[0] for a, b in pairwise(settled))
    return Measured(lags, len(settled), misplaced, core)


def _read(follower: subprocess.Popen[bytes], arrivals: list[tuple[float, float]]) -> None:
    """Records (time of writing, time of arrival) of every line."""
    assert follower.stdout is not None
    for line in follower.stdout:
        now = time.time()
        arrivals.append((datetime.fromisoformat(line.split(None, 2)[1].decode()).timestamp(), now))


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--write"]:
        write_lines(Path(arguments[1]), int(arguments[2]), float(arguments[3]), float(arguments[4]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--rate", type=float, default=10.0, help="lines per second in each file")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args(arguments)
    found = measure(options.files, options.rate, options.seconds)
    print(
        f"{options.files} files, {options.rate:g} lines/s each, {os.cpu_count()} cores: {found.written} lines followed"
    )
    print(f"  lag      median {found.lag(0.5):.2f} s, 99% {found.lag(0.99):.2f} s, longest {found.lags[-1]:.2f} s")
    print(f"  order    {found.misplaced} lines came after a later one")
    print(f"  CPU      {found.core:.1%} of a core")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Time from a killed rank to the next new update, compared with the time from a cold start to the first update.

Each round starts a run on two CPU ranks, kills a rank with SIGKILL after some updates, and waits for an update that was
not made before. Both times are from the same run: planning, Ray's start and placing are part of the cold start alone,
loading the checkpoint and repeating updates part of the recovery alone. Data and measurements are cached before.

    python benchmarks/recovery.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tiny_models import make_tiny_model, write_chats  # noqa: E402

LAUNCHER = Path(sys.executable).with_name("launcher")
_RANK_STARTED = re.compile(r"rank 1 started, process ([0-9]+)$", re.MULTILINE)
_WAIT_SECONDS = 180.0
TARGET = 0.5


@dataclass(frozen=True)
class Recovery:
    """Seconds from the start to the first update, and from the kill to the next new one."""

    cold: float
    recovery: float

    @property
    def ratio(self) -> float:
        return self.recovery / self.cold


def write_job(folder: Path, updates: int, save_every: int) -> Path:
    """A job with a tiny model on two CPU ranks."""
    if not (folder / "model").exists():
        make_tiny_model(folder / "model")
        write_chats(folder / "chats.jsonl", 40)
    job = {
        "name": "recovery",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "chats.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache")},
        "train": {"max_steps": updates, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4},
        "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 4},
        "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
        "checkpoint": {"every": save_every, "keep": 2},
        "output_dir": str(folder / "runs"),
        "export": False,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


class Run:
    """A `launcher run` that is watched through its files."""

    def __init__(self, job: Path, folder: Path) -> None:
        known = set(folder.glob("runs/*"))
        self.started = time.monotonic()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._log = folder / "output.txt"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(LAUNCHER), "run", str(job)], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.wait_for(lambda: bool(set(folder.glob("runs/*")) - known))
        (self.folder,) = set(folder.glob("runs/*")) - known

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Waits for the condition; returns the time on the monotonic clock."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run ended early or made no progress:\n{self._log.read_text()}")
            time.sleep(0.01)
        return time.monotonic()

    def updates(self) -> int:
        """The updates made so far: one above the last line of metrics.jsonl."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
            return int(json.loads(lines[-1])["update"]) + 1
        except (OSError, IndexError, ValueError):
            return 0

    def kill_a_rank(self) -> float:
        """Kills rank 1 of the present attempt; returns the time on the monotonic clock."""
        (log,) = self.folder.glob("logs/node-0-*/agent.log")
        pid = int(_RANK_STARTED.findall(log.read_text())[-1])
        now = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return now


@contextmanager
def running(job: Path, folder: Path) -> Iterator[Run]:
    """A run that is ended at the end of the block."""
    run = Run(job, folder)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(60)


def measure(job: Path, folder: Path) -> Recovery:
    with running(job, folder) as run:
        first = run.wait_for(lambda: run.updates() >= 1)
        run.wait_for(lambda: run.updates() >= 25)
        killed = run.kill_a_rank()
        time.sleep(0.5)
        made = run.updates()
        again = run.wait_for(lambda: run.updates() > made)
        return Recovery(first - run.started, again - killed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        job = write_job(folder, updates=100_000, save_every=10)
        measure(job, folder)  # fills the caches
        found = [measure(job, folder) for _ in range(options.rounds)]
    for each in found:
        print(f"cold start {each.cold:5.1f} s   recovery {each.recovery:5.1f} s   ratio {each.ratio:.2f}")
    ratio = median(each.ratio for each in found)
    print(f"median ratio {ratio:.2f} (target: at most {TARGET:.2f})")
    if options.json:
        rows = [{"cold": each.cold, "recovery": each.recovery} for each in found]
        options.json.write_text(json.dumps({"ratio": ratio, "rounds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

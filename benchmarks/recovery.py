"""Time from a killed rank to the next new update, compared with the time from a cold start to the first update.

Each round starts a run on two CPU ranks, kills a rank with SIGKILL after some updates, and waits for an update that was
not made before. Both times are from the same run: planning, Ray's start and placing are part of the cold start alone,
loading the checkpoint and repeating updates part of the recovery alone. Data and measurements are cached before.

    python benchmarks/recovery.py [--rounds 5] [--json FILE]

With --hosts the run has two nodes and a spare node, on three hosts of tests/cluster with a Ray that runs already (as
root). Then a rank of the second node is killed, or that node is powered off: its connections close, or it only stops
answering, as after a loss of power. The cold start is that of the same run.

    python benchmarks/recovery.py --hosts [--rounds 1] [--json FILE]
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster.hosts import CPU_ONLY, HostProcess, Hosts, several_hosts  # noqa: E402
from tests.cluster.ray_cluster import RayCluster  # noqa: E402
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


def write_job(folder: Path, updates: int, save_every: int, **cluster: int) -> Path:
    """A job with a tiny model on two CPU ranks, of one node unless `cluster` says otherwise."""
    if not (folder / "model").exists():
        make_tiny_model(folder / "model")
        write_chats(folder / "chats.jsonl", 40)
    job = {
        "name": "recovery",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "chats.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache")},
        "train": {"max_steps": updates, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4},
        "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 4},
        "cluster": {"processes_per_node": 2, "gpus_per_node": 0, **cluster},
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
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        log = folder / "output.txt"
        known = set(folder.glob("runs/*"))
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(LAUNCHER), "run", str(job)], stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        self._watch(process, log, folder, known, started)

    def _watch(
        self, process: subprocess.Popen[bytes], log: Path, folder: Path, known: set[Path], started: float
    ) -> None:
        self.process, self._log, self.started = process, log, started
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

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill_a_rank(self) -> float:
        """Kills rank 1 of the present attempt; returns the time on the monotonic clock."""
        (log,) = self.folder.glob("logs/node-0-*/agent.log")
        pid = int(_RANK_STARTED.findall(log.read_text())[-1])
        now = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return now


@contextmanager
def running(run: Run) -> Iterator[Run]:
    """Ends the run at the end of the block."""
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.stop()
            run.process.wait(60)


def measure(job: Path, folder: Path) -> Recovery:
    with running(Run(job, folder)) as run:
        return recovery_of(run, run.kill_a_rank)


def recovery_of(run: Run, fail: Callable[[], float]) -> Recovery:
    """Waits for some updates, calls `fail`, which returns the time, and waits for the next new update."""
    first = run.wait_for(lambda: run.updates() >= 1)
    run.wait_for(lambda: run.updates() >= 25)
    failed = fail()
    time.sleep(0.5)
    made = run.updates()
    again = run.wait_for(lambda: run.updates() > made)
    return Recovery(first - run.started, again - failed)


class HostsRun(Run):
    """A `launcher run` on h1 of a testbed, with the second node on h2 and the spare node on h3."""

    def __init__(self, job: Path, cluster: RayCluster) -> None:
        folder = cluster.hosts.shared
        known = set(folder.glob("runs/*"))
        started = time.monotonic()
        self._launcher: HostProcess = cluster.popen("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379")
        self._watch(self._launcher.process, self._launcher.output_file, folder, known, started)

    def stop(self) -> None:
        self._launcher.signal()


def kill_rank(hosts: Hosts) -> float:
    ranks = [process for process in hosts.processes("h2") if "launcher.worker" in process.cmdline()]
    now = time.monotonic()
    ranks[0].kill()
    return now


def power_off(hosts: Hosts) -> float:
    now = time.monotonic()
    hosts.power_off("h2")
    return now


def lose_power(hosts: Hosts) -> float:
    now = time.monotonic()
    hosts.cut("h2")
    hosts.power_off("h2")
    return now


FAILURES = {"rank killed": kill_rank, "connections closed": power_off, "no answer": lose_power}


def measure_on_hosts(rounds: int) -> dict[str, list[Recovery]]:
    """The recoveries by kind of failure. The spare node takes over in all but the first kind."""
    found: dict[str, list[Recovery]] = {kind: [] for kind in FAILURES}
    with several_hosts(3) as hosts:
        hosts.environment.update(CPU_ONLY)
        cluster = RayCluster(hosts, cpus=2).start()
        job = write_job(hosts.shared, updates=100_000, save_every=10, nodes=2, spare_nodes=1, processes_per_node=1)
        with running(HostsRun(job, cluster)) as run:  # fills the caches
            run.wait_for(lambda: run.updates() >= 1)
        for _ in range(rounds):
            for kind, fail in FAILURES.items():
                with running(HostsRun(job, cluster)) as run:
                    found[kind].append(recovery_of(run, partial(fail, hosts)))
                if fail is not kill_rank:
                    hosts.power_on("h2")
                    cluster.join("h2")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, help="default: 5, and 1 with --hosts")
    parser.add_argument("--hosts", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = (
        measure_on_hosts(options.rounds or 1) if options.hosts else {"rank killed": measure_here(options.rounds or 5)}
    )
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    for kind, recoveries in found.items():
        for each in recoveries:
            times = f"cold start {each.cold:5.1f} s   recovery {each.recovery:5.1f} s   ratio {each.ratio:.2f}"
            print(f"{kind:18}   {times}")
        ratio = median(each.ratio for each in recoveries)
        print(f"{kind:18}   median ratio {ratio:.2f} (target: at most {TARGET:.2f})")
    if options.json:
        rows = {kind: [asdict(each) for each in recoveries] for kind, recoveries in found.items()}
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure_here(rounds: int) -> list[Recovery]:
    """The recoveries of a run on one node of this machine."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        job = write_job(folder, updates=100_000, save_every=10)
        measure(job, folder)  # fills the caches
        return [measure(job, folder) for _ in range(rounds)]


if __name__ == "__main__":
    main()

"""Builds run directories like those of runs on several nodes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.run_dir import RunDir, append_line, write_json

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()
GIB = 1024**3


def stamp(seconds: float) -> str:
    """The time `seconds` after START, in the format of a run's files."""
    time = datetime.fromtimestamp(START + seconds, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bytes_read() -> int:
    """The number of bytes that this process has read so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


class Built:
    """A run directory. All times are in seconds after START by the supervisor's clock, unless stated otherwise."""

    def __init__(self, output_dir: Path, name: str = "tiny-20260301-120000") -> None:
        self.run = RunDir(output_dir / name)
        self.run.logs.mkdir(parents=True)
        self.event(0, "state", state="planning")

    def event(self, at: float, kind: str, **details: Any) -> None:
        append_line(self.run.events_file, {"time": stamp(at), "event": kind, **details})

    def state(self, state: str, at: float = 0.0, **details: Any) -> None:
        write_json(self.run.state_file, {"state": state, "since": stamp(at), "host": "h0", "pid": 4711, **details})
        self.event(at, "state", state=state)

    def nodes(self, hosts: Iterable[str], at: float = 1.0, offsets: Iterable[float] | None = None) -> None:
        """Places the nodes; `offsets` are the seconds by which their clocks are ahead."""
        self.event(at, "state", state="placing")
        hosts = list(hosts)
        for rank, (host, offset) in enumerate(zip(hosts, offsets or [0.0] * len(hosts), strict=True)):
            facts = {"address": f"10.0.0.{rank}", "interface": "eth0", "gpus": [], "clock_offset_seconds": offset}
            self.event(at, "node", node_rank=rank, host=host, **facts)

    def log(self, node_rank: int, host: str, name: str, *lines: tuple[float, str] | str, torn: str = "") -> Path:
        """Adds lines to a log: (seconds, text) by that node's clock, or text without a time."""
        path = self.run.node_logs(node_rank, host) / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            for line in lines:
                file.write(line + "\n" if isinstance(line, str) else f"{stamp(line[0])} {line[1]}\n")
            file.write(torn)
        return path

    def node_json(self, node_rank: int, host: str, at: float, ranks: Iterable[dict[str, Any]], **facts: Any) -> None:
        record = {
            "time": stamp(at),
            "node_rank": node_rank,
            "host": host,
            "cpus": 8,
            "cpu_percent": 50.0,
            "memory_used_bytes": 10 * GIB,
            "memory_bytes": 64 * GIB,
            "gpus": [],
            "ended": False,
            "ranks": list(ranks),
            **facts,
        }
        folder = self.run.node_logs(node_rank, host)
        folder.mkdir(exist_ok=True)
        (folder / "node.json").write_text(json.dumps(record))

    def plan(self, updates: int) -> None:
        self.run.plan_file.write_text(json.dumps({"sha256": "0", "plan": {"length": {"total_updates": updates}}}))

    def metrics(self, updates: Iterable[int], at: float = 10.0, every: float = 2.0, **changes: Any) -> None:
        """Writes lines to metrics.jsonl, one every `every` seconds, starting at `at`."""
        lines = [
            {
                "update": update,
                "samples": 8 * (update + 1),
                "tokens": 512,
                "loss": 3.0 - update / 100,
                "lr": 1e-5 * (update + 1),
                "step_seconds": 1.5,
                "tokens_per_second": 340.0 + update,
                "time": stamp(at + every * index),
                **changes,
            }
            for index, update in enumerate(updates)
        ]
        with self.run.metrics_file.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def failure(self, at: float, *failures: dict[str, Any]) -> None:
        """Writes a "failure" event; its first failure is the run's first failure."""
        known = {"error": None, "traceback": None}
        listed = [{**known, "time": START + at + index / 100, **one} for index, one in enumerate(failures)]
        named = {key: listed[0][key] for key in ("rank", "node_rank", "host", "how", "error")}
        self.event(at, "failure", **named, failures=listed)


def rank(number: int, **changes: Any) -> dict[str, Any]:
    """The record of a rank in node.json."""
    return {
        "rank": number,
        "local_rank": 0,
        "pid": 100 + number,
        "alive": True,
        "exit_code": None,
        "phase": "training",
        "updates": 17,
        "step_seconds": 0.8,
        "own_seconds": 0.3,
        "memory_bytes": GIB,
        "gpu_memory_used_bytes": None,
        "time": None,
        **changes,
    }

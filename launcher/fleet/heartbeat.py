"""node.json: the state of a node and its ranks, written every few seconds for the watching commands."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher.fleet.cgroup import ControlGroup
from launcher.fleet.process import RankProcess
from launcher.records import AgentReport, GpuRecord, NodeIdentity, NodeRecord, OomKills, Phase, RankRecord
from launcher.run_dir import NODE_FILE, utc_now, utc_text, write_atomic

_EVERY_SECONDS = 5.0
_FIRST_SECONDS = 0.2
_RECENT_UPDATES = 20
_PEAK_BEATS = 6
"""Peak memory is the maximum over this many heartbeats: after a rank was killed, its memory is free again."""


@dataclass
class RankStatus:
    """What one rank has reported."""

    process: RankProcess
    local_rank: int
    phase: Phase | None = None
    updates: int | None = None
    exit_code: int | None = None
    gpu_memory_used_bytes: int | None = None
    last_report: float | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_UPDATES))
    own_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_UPDATES))

    def receive(self, report: AgentReport) -> None:
        """Processes a report of the rank."""
        self.last_report = report["time"]
        if report["report"] == "phase":
            self.phase = report["phase"]
        elif report["report"] == "exit":
            self.exit_code = report["code"]
        elif report["report"] == "update":
            self.updates = report["update"] + 1
            self.gpu_memory_used_bytes = report.get("gpu_memory_used_bytes", self.gpu_memory_used_bytes)
            for recent, seconds in (
                (self.step_seconds, report.get("step_seconds")),
                (self.own_seconds, report.get("own_seconds")),
            ):
                if seconds is not None:
                    recent.append(seconds)

    def record(self) -> RankRecord:
        return {
            "rank": self.process.rank,
            "local_rank": self.local_rank,
            "pid": self.process.pid,
            "alive": self.exit_code is None,
            "exit_code": self.exit_code,
            "phase": self.phase,
            "updates": self.updates,
            "step_seconds": _median(self.step_seconds),
            "own_seconds": _median(self.own_seconds),
            "memory_bytes": _resident_bytes(self.process.pid),
            "gpu_memory_used_bytes": self.gpu_memory_used_bytes,
            "time": None if self.last_report is None else utc_text(self.last_report),
        }


class Heartbeat:
    """Writes node.json of one node until `end` is called."""

    def __init__(self, folder: Path, identity: NodeIdentity) -> None:
        self._file, self._identity = folder / NODE_FILE, identity
        self._ranks: dict[int, RankStatus] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._gpus = _Gpus()
        self._group = ControlGroup()
        self._killed_before = self._group.oom_kills()
        self._used: deque[int] = deque(maxlen=_PEAK_BEATS)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def begin(self, processes: Sequence[RankProcess]) -> None:
        """Starts writing. `processes` are the node's ranks in the order of their local ranks."""
        with self._lock:
            self._ranks = {process.rank: RankStatus(process, local) for local, process in enumerate(processes)}
        self._thread.start()

    def receive(self, report: AgentReport) -> None:
        """Processes a report of a rank."""
        with self._lock:
            if (rank := self._ranks.get(report["rank"])) is not None:
                rank.receive(report)

    def end(self) -> None:
        """Writes the file for the last time."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_EVERY_SECONDS)

    def _beat(self) -> None:
        psutil.cpu_percent()  # measures since its last call in the same thread
        ended = self._ended.wait(_FIRST_SECONDS)
        self._write()
        while not ended:
            ended = self._ended.wait(_EVERY_SECONDS)
            self._write()

    def _write(self) -> None:
        memory = self._group.memory()
        self._used.append(memory.used_bytes)
        with self._lock:
            ranks = [rank.record() for rank in self._ranks.values()]
        record: NodeRecord = {
            "time": utc_now(),
            **self._identity,
            "cpus": len(os.sched_getaffinity(0)),
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_bytes": memory.used_bytes,
            "memory_peak_bytes": max(self._used),
            "memory_bytes": memory.total_bytes,
            **self._oom_kills(),
            "gpus": self._gpus.read(),
            "ended": self._ended.is_set(),
            "ranks": ranks,
        }
        # The ranks report a full disk or a lost mount; a file for watching must not end their agent.
        with contextlib.suppress(OSError):
            write_atomic(self._file, json.dumps(record), durable=False)

    def _oom_kills(self) -> OomKills:
        """How many processes the kernel killed for lack of memory since the start, if it counts them."""
        kills = self._group.oom_kills()
        return {} if kills is None or self._killed_before is None else {"oom_kills": kills - self._killed_before}


class _Gpus:
    """The GPUs of this process, through NVML; none if there is no driver."""

    def __init__(self) -> None:
        import pynvml

        self._handles: list[tuple[int, Any]] = []
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            for index, name in enumerate(visible_gpus()):
                with contextlib.suppress(pynvml.NVMLError):
                    self._handles.append((index, self._handle(name)))

    def read(self) -> list[GpuRecord]:
        """Name, memory and utilization of each. What NVML does not report, as the utilization under MIG, is None."""
        return [self._read(index, handle) for index, handle in self._handles]

    @staticmethod
    def _handle(name: str) -> Any:
        from pynvml import nvmlDeviceGetHandleByIndex, nvmlDeviceGetHandleByUUID

        return nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvmlDeviceGetHandleByUUID(name)

    @staticmethod
    def _read(index: int, handle: Any) -> GpuRecord:
        import pynvml

        def query(function: Callable[[Any], Any]) -> Any:
            with contextlib.suppress(pynvml.NVMLError):
                return function(handle)
            return None

        memory = query(pynvml.nvmlDeviceGetMemoryInfo)
        use = query(pynvml.nvmlDeviceGetUtilizationRates)
        return {
            "index": index,
            "name": query(pynvml.nvmlDeviceGetName),
            "memory_used_bytes": memory and int(memory.used),
            "memory_bytes": memory and int(memory.total),
            "utilization_percent": use and int(use.gpu),
        }


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, each a number or UUID."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def _resident_bytes(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _median(values: deque[float]) -> float | None:
    return round(statistics.median(values), 6) if values else None

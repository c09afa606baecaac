"""metrics.jsonl (one line per update) and evaluations.jsonl, written by the first rank."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from launcher.run_dir import RunDir, append_line, json_number, utc_now
from launcher.worker.ranks import Ranks


class MetricsWriter:
    """Measures the updates and writes their metrics."""

    def __init__(self, run: RunDir, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        self._since = time.perf_counter()
        self._seconds = 0.0

    def last_step(self) -> dict[str, Any]:
        """Step time and GPU memory of this rank's last update, for the report to the agent."""
        cuda = self._ranks.device.type == "cuda"
        memory = int(torch.cuda.memory_reserved(self._ranks.device)) if cuda else None
        return {"step_seconds": round(self._seconds, 6), "gpu_memory_bytes": memory}

    def restart_clock(self) -> None:
        """Excludes what happened since the last update (an evaluation, a checkpoint) from the next step time."""
        self._since = time.perf_counter()

    def write(self, **update: Any) -> None:
        """Writes one line: the given values of the update, and step time, tokens/s and peak memory."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._seconds = seconds
        if not self._ranks.first:
            return
        line = {
            **{key: json_number(value) for key, value in update.items()},
            "step_seconds": round(seconds, 6),
            "tokens_per_second": round(update["tokens"] / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(self._ranks.device),
            "time": utc_now(),
        }
        append_line(self._run.metrics_file, line)

    def write_evaluation(self, **evaluation: Any) -> None:
        """Writes one line to evaluations.jsonl."""
        if self._ranks.first:
            line = {key: json_number(value) for key, value in evaluation.items()}
            append_line(self._run.evaluations_file, {**line, "time": utc_now()})
        self.restart_clock()


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory allocated on the GPU, or the peak resident size of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

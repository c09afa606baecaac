"""metrics.jsonl (one line per update) and evaluations.jsonl, written by the first rank."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

from launcher.records import EvaluationLine, MetricsLine, RouterLoss, Utilisation
from launcher.run_dir import RunDir, append_line, json_number, utc_now

if TYPE_CHECKING:
    import torch

    from launcher.worker.ranks import Ranks


class MetricsWriter:
    """Measures the updates and writes their metrics."""

    def __init__(self, run: RunDir, ranks: Ranks, peak_tflops: float | None = None) -> None:
        """`peak_tflops`: what the device of a rank can do at most, if it is known."""
        self._run, self._ranks, self._peak = run, ranks, peak_tflops
        self._since = time.perf_counter()
        self.step_seconds = 0.0
        """Of this rank's last update."""

    def gpu_memory_used_bytes(self) -> int | None:
        """The GPU memory that this rank's process has reserved; None on a CPU."""
        if self._ranks.device.type != "cuda":
            return None
        import torch

        return int(torch.cuda.memory_reserved(self._ranks.device))

    def restart_clock(self) -> None:
        """Excludes what happened since the last update (an evaluation, a checkpoint) from the next step time."""
        self._since = time.perf_counter()

    def write(
        self,
        *,
        update: int,
        samples: int,
        tokens: int,
        loss: float,
        lr: float,
        grad_norm: float | None,
        skipped: bool,
        data_seconds: float,
        router_loss: float | None = None,
        flops: float | None = None,
    ) -> None:
        """Writes one line: the given values of the update, and step time, tokens/s, utilisation and peak memory.

        `flops` are those of the update on all ranks.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.step_seconds = round(seconds, 6)
        if not self._ranks.first:
            return
        router: RouterLoss = {} if router_loss is None else {"router_loss": json_number(router_loss)}
        line: MetricsLine = {
            "update": update,
            "samples": samples,
            "tokens": tokens,
            "loss": json_number(loss),
            "lr": json_number(lr),
            "grad_norm": json_number(grad_norm),
            "skipped": skipped,
            **router,
            "step_seconds": self.step_seconds,
            "data_seconds": data_seconds,
            "tokens_per_second": round(tokens / seconds, 1),
            **self._utilisation(flops, seconds),
            "peak_memory_bytes": peak_memory_bytes(self._ranks.device),
            "time": utc_now(),
        }
        self._run.check_attempt()
        append_line(self._run.metrics_file, line)

    def _utilisation(self, flops: float | None, seconds: float) -> Utilisation:
        if flops is None:
            return {}
        tflops = flops / seconds / self._ranks.world_size / 1e12
        found: Utilisation = {"tflops": float(f"{tflops:.4g}")}
        return found if self._peak is None else {**found, "mfu": round(tflops / self._peak, 4)}

    def write_evaluation(self, update: int, loss: float, perplexity: float, targets: int) -> None:
        """Writes one line to evaluations.jsonl."""
        if self._ranks.first:
            line: EvaluationLine = {
                "update": update,
                "loss": json_number(loss),
                "perplexity": json_number(perplexity),
                "targets": targets,
                "time": utc_now(),
            }
            self._run.check_attempt()
            append_line(self._run.evaluations_file, line)
        self.restart_clock()


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory allocated on the GPU, or the peak resident size of the process."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

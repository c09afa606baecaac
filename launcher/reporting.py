"""`launcher.report`: what a script of one's own may tell the launcher while it trains.

Standard library alone, so that `import launcher` costs a script nothing. Outside a run of the launcher it does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import sys
import time
from pathlib import Path
from typing import Any

from launcher.records import UpdateReport
from launcher.run_dir import RunDir, append_line, json_number, utc_now, write_atomic
from launcher.tail import Tail

_last: tuple[int, float] | None = None
"""The update reported last, and when on the monotonic clock."""
_unwritten_told = False
_OWN = ("update", "samples", "step_seconds", "peak_memory_bytes", "time")
"""What a line of metrics.jsonl has of the launcher's own."""


def report(*, step: int, loss: Any = None, lr: Any = None, **more: Any) -> None:
    """Tells of one update (optimizer step) that was made: once an update, or once every few, on every rank.

    `step` is the update's number, from 0. `loss`, `lr` (the rate that the update was made with) and `more` are numbers,
    or tensors of one element, and are written down as the first rank has them: a line of metrics.jsonl, with the
    samples so far, the seconds an update and the memory. With `tokens`, the update's own, comes tokens_per_second.

    Raises ValueError for a step below 0 or a name that is the launcher's own, and TypeError for what is no number. A
    line that cannot be written, on a full disk for one, is told once on standard error: training goes on.
    """
    fd, folder = os.environ.get("LAUNCHER_REPORT_FD"), os.environ.get("LAUNCHER_RUN_DIR")
    if fd is None or folder is None:
        return
    step = int(step)
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}")
    if taken := [name for name in _OWN if name in more]:
        raise ValueError(f"{', '.join(taken)}: launcher.report writes that itself; give it another name")
    first = _last is None
    seconds = _step_seconds(step)
    _tell_agent(int(fd), step, seconds)
    if os.environ.get("RANK", "0") == "0":
        line = _line(step, seconds, {"loss": loss, "lr": lr, **more})
        try:
            _write(RunDir(Path(folder)), line, first)
        except OSError as error:
            _tell_unwritten(error)


def _write(run: RunDir, line: dict[str, Any], first: bool) -> None:
    if first and os.environ.get("LAUNCHER_RESTART_COUNT", "0") != "0":
        _take_back(run, line["update"])
    append_line(run.metrics_file, line)


def _take_back(run: RunDir, update: int) -> None:
    """The lines of earlier updates that were set aside as the script was started again: it does not make those anew."""
    undone = [path for path in run.path.glob("metrics.undone-*.jsonl") if path.stem.rpartition("-")[2].isdigit()]
    if not undone or Tail(run.metrics_file).new():
        return
    newest = max(undone, key=lambda path: int(path.stem.rpartition("-")[2]))
    kept = [line for line in Tail(newest).new() if line.get("update", update) < update]
    write_atomic(run.metrics_file, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept))


def _tell_unwritten(error: OSError) -> None:
    global _unwritten_told
    if not _unwritten_told:
        _unwritten_told = True
        with contextlib.suppress(OSError):
            print(f"launcher.report: metrics are not written: {error}", file=sys.stderr, flush=True)


def _step_seconds(step: int) -> float | None:
    """Seconds an update since the last report; None at the first, and where the count went back."""
    global _last
    now, before = time.perf_counter(), _last
    _last = (step, now)
    return None if before is None or step <= before[0] else (now - before[1]) / (step - before[0])


def _tell_agent(fd: int, step: int, seconds: float | None) -> None:
    report: UpdateReport = {"report": "update", "time": time.time(), "update": step, "step_seconds": seconds}
    gpu = _gpu_memory_bytes()
    if gpu is not None:
        report["gpu_memory_bytes"] = gpu
    line = json.dumps(report) + "\n"
    # An agent that is gone does not hear.
    with contextlib.suppress(OSError):
        if _is_the_pipe(fd):
            os.write(fd, line.encode())


def _is_the_pipe(fd: int) -> bool:
    """A process that the script started has the number in its environment, and something else or nothing behind it."""
    own = os.environ.get("LAUNCHER_REPORT_PID") == str(os.getpid())
    return own and stat.S_ISFIFO(os.fstat(fd).st_mode)


def _line(step: int, seconds: float | None, values: dict[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl, without what is not known."""
    batch = os.environ.get("LAUNCHER_TRAIN_BATCH_SIZE")
    given = {key: _plain(value) for key, value in values.items() if value is not None}
    line: dict[str, Any] = {"update": step}
    if batch is not None:
        line["samples"] = (step + 1) * int(batch)
    line |= given
    if seconds is not None:
        line["step_seconds"] = round(seconds, 6)
        if seconds > 0 and isinstance(given.get("tokens"), int | float):
            line["tokens_per_second"] = round(given["tokens"] / seconds, 1)
    gpu = _gpu_memory_bytes()
    line["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if gpu is None else gpu
    return {**line, "time": utc_now()}


def _gpu_memory_bytes() -> int | None:
    """The most that PyTorch allocated on this rank's GPU; None where the script does not use one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def _plain(value: Any) -> Any:
    """A number for JSON, of a number or of a tensor with one element."""
    return value if isinstance(value, bool | int | str) else json_number(float(value))

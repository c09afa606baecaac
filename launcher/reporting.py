"""`launcher.report`: a user's script reports its progress and metrics to the launcher.

It imports only the standard library, so `import launcher` is fast. Outside a run of the launcher it does nothing.
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

from launcher.errors import RunFailed
from launcher.files import Tail
from launcher.records import UpdateReport
from launcher.run_dir import RunDir, append_line, json_number, utc_now, write_atomic

_last: tuple[int, float] | None = None
"""The update that was last reported, and when, on the monotonic clock."""
_warned = False
_RESERVED = ("update", "samples", "step_seconds", "peak_memory_bytes", "time")
"""The keys of metrics.jsonl that the launcher itself writes."""


def report(*, step: int, loss: Any = None, lr: Any = None, **more: Any) -> None:
    """Reports one completed update (optimizer step). Call it after every update, or every few, on every rank.

    `step` is the number of the update, from 0. `loss`, `lr` (the learning rate of this update) and `more` are numbers
    or tensors with one element. Rank 0 writes its values as a line of metrics.jsonl, with the samples so far, the
    seconds per update and the memory; if `tokens`, the number of tokens in this update, is given, also with
    tokens_per_second.

    Raises ValueError for a negative step or a reserved name, and TypeError for a value that is not a number. If a line
    cannot be written, for example on a full disk, it warns once on standard error and training continues.
    """
    fd, folder = os.environ.get("LAUNCHER_REPORT_FD"), os.environ.get("LAUNCHER_RUN_DIR")
    if fd is None or folder is None:
        return
    step = int(step)
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    if reserved := [name for name in _RESERVED if name in more]:
        raise ValueError(f"{', '.join(reserved)}: reserved name, written by launcher.report itself; use another name")
    first = _last is None
    seconds = _step_seconds(step)
    _send_to_agent(int(fd), step, seconds)
    if os.environ.get("RANK", "0") == "0":
        line = _line(step, seconds, {"loss": loss, "lr": lr, **more})
        try:
            _write(RunDir(Path(folder)), line, first)
        except (OSError, RunFailed) as error:
            _warn_not_written(error)


def _write(run: RunDir, line: dict[str, Any], first: bool) -> None:
    """Raises OSError, and RunFailed if this script belongs to an attempt that was given up."""
    if first and os.environ.get("LAUNCHER_RESTART_COUNT", "0") != "0":
        _restore_earlier_lines(run, line["update"])
    run.check_attempt()
    append_line(run.metrics_file, line)


def _restore_earlier_lines(run: RunDir, update: int) -> None:
    """Restores the lines before `update` that the restart set aside: the restarted script does not repeat them."""
    undone = [path for path in run.path.glob("metrics.undone-*.jsonl") if path.stem.rpartition("-")[2].isdigit()]
    if not undone or Tail(run.metrics_file).new():
        return
    newest = max(undone, key=lambda path: int(path.stem.rpartition("-")[2]))
    kept = [line for line in Tail(newest).new() if line.get("update", update) < update]
    write_atomic(run.metrics_file, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept))


def _warn_not_written(error: OSError | RunFailed) -> None:
    global _warned
    if not _warned:
        _warned = True
        with contextlib.suppress(OSError):
            print(f"launcher.report: metrics are not written: {error}", file=sys.stderr, flush=True)


def _step_seconds(step: int) -> float | None:
    """Seconds per update since the last report; None for the first report, or if the step did not increase."""
    global _last
    now, before = time.perf_counter(), _last
    _last = (step, now)
    return None if before is None or step <= before[0] else (now - before[1]) / (step - before[0])


def _send_to_agent(fd: int, step: int, seconds: float | None) -> None:
    report: UpdateReport = {"report": "update", "time": time.time(), "update": step, "step_seconds": seconds}
    gpu = _gpu_memory_used_bytes()
    if gpu is not None:
        report["gpu_memory_used_bytes"] = gpu
    line = json.dumps(report) + "\n"
    # The write fails if the agent has ended.
    with contextlib.suppress(OSError):
        if _is_report_pipe(fd):
            os.write(fd, line.encode())


def _is_report_pipe(fd: int) -> bool:
    """False in a process that the script started: it inherits the variables, but `fd` may be another file or closed."""
    own = os.environ.get("LAUNCHER_REPORT_PID") == str(os.getpid())
    return own and stat.S_ISFIFO(os.fstat(fd).st_mode)


def _line(step: int, seconds: float | None, values: dict[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl, without unknown values."""
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
    gpu = _gpu_memory_used_bytes()
    line["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if gpu is None else gpu
    return {**line, "time": utc_now()}


def _gpu_memory_used_bytes() -> int | None:
    """The peak memory that PyTorch allocated on this rank's GPU; None if the script does not use a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def _plain(value: Any) -> Any:
    """A number or a tensor with one element, as a JSON value."""
    return value if isinstance(value, bool | int | str) else json_number(float(value))

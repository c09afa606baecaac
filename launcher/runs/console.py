"""What a run prints: states, a progress bar with loss, learning rate and tokens/s, and the summary at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launcher.watch.number_format import duration

if TYPE_CHECKING:
    from launcher.fleet.preflight import NodeCheck

_PLAIN_EVERY_SECONDS = 10.0
_LOG_WIDTH = 200
_STDERR = 2
_STATE_LINES = {
    "planning": "planning",
    "preparing": "preparing the data",
    "placing": "placing the nodes",
    "starting": "starting the ranks",
    "saving": "saving a checkpoint",
    "exporting": "exporting the model",
}


class _LossyStream:
    """A text stream that drops what can no longer be written: its pipe is closed, or its terminal is gone."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _dropping_if_lost(self._stream):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _dropping_if_lost(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _dropping_if_lost(stream: IO[str]) -> Iterator[None]:
    """Sends a stream that can no longer be written to /dev/null, and standard error if it is the same file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        file, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError):
            if os.path.sameopenfile(file, _STDERR):
                os.dup2(null, _STDERR)
        os.dup2(null, file)
        os.close(null)


class _LossyConsole(Console):
    """A console that prints nothing after its pipe is closed or its terminal is gone; the run continues."""

    @property
    def file(self) -> IO[str]:
        return cast("IO[str]", _LossyStream(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


class RunConsole:
    """Shows the progress of one run: live in a terminal, otherwise as a line every few seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _LossyConsole(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._last_plain = 0.0
        self.total = 0

    def state(self, name: str) -> None:
        """Prints that the run has entered a state."""
        if name in _STATE_LINES:
            self._print(f"[dim]{time.monotonic() - self._began:6.1f} s[/]  {_STATE_LINES[name]}")
        elif name == "training" and self._progress is None:
            self._print(f"[dim]{time.monotonic() - self._began:6.1f} s[/]  training")
            self._start_bar()

    def note(self, text: str) -> None:
        """Prints a line."""
        self._print(text)

    def prepare(self, progress: dict[str, Any]) -> None:
        """Prints the progress of measuring and tokenising."""
        done = f" {progress['done']}/{progress['total']} rows" if progress.get("total") else ""
        if (speed := progress.get("rows_per_second")) is not None and progress["done"] < progress["total"]:
            left = progress.get("seconds_left")
            done += f", {speed:,.0f} rows/s" + (f", {duration(left)} left" if left is not None else "")
        self._print(f"          {progress['message']}{done}")

    def preflight(self, checks: list[NodeCheck]) -> None:
        """Prints the results of the checks of the nodes: a table if there are several nodes, and the notes."""
        if len(checks) > 1:
            print_full_width(self.console, Padding(preflight_table(checks), (0, 0, 0, 10)))
        self.preflight_notes(checks)

    def preflight_notes(self, checks: list[NodeCheck]) -> None:
        """Prints what is unusual about each node but does not prevent the run."""
        for check in checks:
            for note in check.notes:
                self._print(
                    f"          [yellow]note:[/] {escape(f'node {check.node_rank} ({check.node.host}): {note}')}"
                )

    def update(self, metrics: dict[str, Any]) -> None:
        """Shows the metrics of an update."""
        if not isinstance(metrics.get("update"), int):
            return
        text = "  ".join(_update_parts(metrics))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=metrics["update"] + 1, shown=escape(text))
        elif self._due() or metrics["update"] + 1 == self.total:
            self._print(f"          update {metrics['update'] + 1}/{self.total}  {escape(text)}")

    def evaluation(self, evaluation: dict[str, Any]) -> None:
        """Prints the result of an evaluation."""
        update = evaluation.get("update")
        loss, perplexity = (number_text(evaluation.get(key)) for key in ("loss", "perplexity"))
        self._print(f"          evaluation after {update} updates: loss [bold]{loss}[/], perplexity {perplexity}")

    def _start_bar(self) -> None:
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("         "),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
        )
        self._task = self._progress.add_task("training", total=self.total, shown="")
        self._progress.start()

    def end_progress(self) -> None:
        """Stops the progress bar and leaves it on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last_plain < _PLAIN_EVERY_SECONDS:
            return False
        self._last_plain = now
        return True

    def _print(self, text: str) -> None:
        self.console.print(text)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Stops the progress bar when the block is left."""
        try:
            yield
        finally:
            self.end_progress()


def preflight_table(checks: list[NodeCheck]) -> Table:
    """One row per node: its host, network, hardware, package versions, and whether it passed.

    Versions are those of torch, and of other packages that differ between nodes.
    """
    from launcher.fleet.preflight import differing_versions

    versions = ["torch", *(name for name in differing_versions(checks) if name != "torch")]
    speeds = {title: values for title, values in _speeds(checks).items() if any(values)}
    columns = ("node", "host", "address", "interface", "clock", "GPUs", "free", *speeds, *versions, "")
    table = Table(*columns, box=None, pad_edge=False)
    for place, check in enumerate(checks):
        node, facts = check.node, check.facts
        table.add_row(
            str(check.node_rank),
            Text(node.host),
            node.address,
            Text(node.interface or "-"),
            f"{node.clock_offset_seconds:+.3f} s",
            f"{facts.gpus} {facts.gpu_name}" if facts.gpus else "0",
            f"{facts.free_bytes / 1024**3:.0f} GiB",
            *(values[place] or "-" for values in speeds.values()),
            *(facts.versions.get(name, "missing") for name in versions),
            "[red]unfit[/]" if check.problems else "[green]ok[/]",
        )
    return table


def _speeds(checks: list[NodeCheck]) -> dict[str, list[str]]:
    """The figures of the health checks by title, for each node: of its slowest device, better link, and disk."""
    from launcher.fleet.health import speed_text

    healths = [check.health for check in checks]
    disks = [health.disk_bytes_per_second for health in healths]
    links = [health.network_bytes_per_second for health in healths]
    return {
        "disk": [speed_text(value) if value else "" for value in disks],
        "network": [speed_text(value) if value else "" for value in links],
        "TFLOP/s": [f"{health.tflops:.3g}" if health.tflops else "" for health in healths],
    }


def _update_parts(metrics: dict[str, Any]) -> Iterator[str]:
    """The known metrics of an update; a user's script may report only some."""
    if "loss" in metrics:
        yield f"loss {number_text(metrics['loss'])}"
    if "lr" in metrics:
        yield f"lr {number_text(metrics['lr'], '.2e')}"
    if "tokens_per_second" in metrics:
        yield f"{number_text(metrics['tokens_per_second'], ',.0f')} tokens/s"
    if "mfu" in metrics:
        yield f"MFU {number_text(metrics['mfu'], '.0%')}"


def print_full_width(console: Console, table: RenderableType) -> None:
    """Prints a table, outside a terminal without wrapping it."""
    if not console.is_terminal:
        console = Console(file=console.file, width=_LOG_WIDTH, highlight=False)
    console.print(table)


def number_text(value: Any, form: str = ".4f") -> str:
    """A formatted number; anything else, such as "nan", unchanged."""
    try:
        return format(value, form) if isinstance(value, float | int) else str(value)
    except (OverflowError, ValueError):
        return "a number too long to show"

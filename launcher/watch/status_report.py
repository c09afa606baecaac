"""The status of runs, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from launcher.watch.node_status import STALE_SECONDS, STRAGGLER_RATIO, NodeStatus
from launcher.watch.number_format import duration, memory, number
from launcher.watch.status import LOST, UNREADABLE, RunStatus
from launcher.watch.terminal_safe import plain

_STYLES = {"finished": "green", "failed": "bold red", LOST: "bold red", "stopped": "yellow", "unknown": "dim"}
_COMPARED = {"own_seconds": "the time of its own work per update", "step_seconds": "its time per update"}
PIPE_WIDTH = 200


def status_console() -> Console:
    """A console that does not truncate tables if the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def status_json(status: RunStatus | Sequence[RunStatus]) -> str:
    """One status as an object; several as a list, without nodes."""
    if isinstance(status, RunStatus):
        return json.dumps(asdict(status), indent=2)
    return json.dumps([{k: v for k, v in asdict(one).items() if k not in ("nodes", "compared")} for one in status])


def status_view(status: RunStatus, most_nodes: int | None = None) -> Group:
    """A run with one row per node, by node rank.

    Of more than `most_nodes`, nodes with problems are shown first, and the hidden ones are counted.
    """
    parts: list[Text | Table] = [summary(status)]
    if status.nodes:
        shown, hidden = _shown_nodes(status.nodes, most_nodes)
        parts += [Text(), _node_table(shown)]
        if hidden:
            parts.append(Text(f"… and {hidden} more nodes", style="dim"))
        parts += [Text(line, style="dim") for line in _legend(status)]
    parts += [Text(plain(line), style="yellow") for line in _excluded(status)]
    return Group(*parts)


def summary(status: RunStatus) -> Text:
    """The run in a few lines."""
    lines = [_state_line(status), _progress_line(status)]
    numbers = _numbers(status)
    if numbers:
        lines.append(Text(f"  {numbers}"))
    lines.append(Text(f"  {_who(status)}", style="dim"))
    lines.append(Text(f"  {status.path}", style="dim"))
    return Text("\n").join(lines)


def one_line(status: RunStatus) -> str:
    """The run in one line, for output that is not a terminal."""
    total = "?" if status.total_updates is None else status.total_updates
    left = "" if status.left_seconds is None else f"  {duration(status.left_seconds)} left"
    numbers = _numbers(status)
    return f"{plain(status.state)}  update {status.updates}/{total}{left}" + (f"  {numbers}" if numbers else "")


def _state_line(status: RunStatus) -> Text:
    line = Text.assemble((status.name, "bold"), "  ", (status.state, _STYLES.get(status.state, "cyan")))
    if status.state == LOST:
        line.append(
            f": its state is {status.written_state}, but no launcher holds its lock; last activity "
            f"{duration(status.silent_seconds)} ago"
        )
        return line
    if status.state_seconds is not None:
        since = duration(status.state_seconds)
        line.append(f" for {since}" if status.live else f" {since} ago")
    if status.reason:
        line.append(f": {plain(str(status.reason).splitlines()[0])}")
    return line


def _progress_line(status: RunStatus) -> Text:
    total = status.total_updates
    if total is None:
        return Text(f"  update {status.updates} of an unknown number")
    share = f" ({status.updates / total:.0%})" if total else ""
    left = f", about {duration(status.left_seconds)} left" if status.left_seconds is not None else ""
    return Text(f"  update {status.updates} of {total}{share}{left}")


def _numbers(status: RunStatus) -> str:
    parts = []
    if status.loss is not None:
        parts.append(f"loss {number(status.loss)}")
    if status.lr is not None:
        parts.append(f"lr {number(status.lr, '.2e')}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.mfu is not None:
        parts.append(f"MFU {status.mfu:.0%}")
    elif status.tflops is not None:
        parts.append(f"{status.tflops:.3g} TFLOP/s per rank")
    if status.step_seconds is not None:
        parts.append(f"{status.step_seconds:.3g} s per update")
    return "  ".join(parts)


def _who(status: RunStatus) -> str:
    parts = [f"{name} job {plain(job)}" for name, job in _jobs(status) if job]
    if status.continued_by:
        parts.append(f"continued by Slurm job {plain(status.continued_by)}")
    if status.host is not None:
        parts.append(f"process {status.pid} on {plain(str(status.host))}")
    if status.live and status.silent_seconds is not None:
        parts.append(f"last activity {duration(status.silent_seconds)} ago")
    return ", ".join(parts) or "the launcher's host and process are unknown"


def _jobs(status: RunStatus) -> tuple[tuple[str, str | None], ...]:
    return ("Slurm", status.slurm_job_id), ("Ray", status.ray_job_id)


def _shown_nodes(nodes: Sequence[NodeStatus], most: int | None) -> tuple[list[NodeStatus], int]:
    if most is None or len(nodes) <= most:
        return list(nodes), 0
    return sorted(nodes, key=lambda node: (not _has_problem(node), node.node_rank))[:most], len(nodes) - most


def _has_problem(node: NodeStatus) -> bool:
    return node.straggler or node.stale or bool(node.exit_codes)


def _node_table(nodes: Sequence[NodeStatus]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    gpus = any(node.gpus for node in nodes)
    shown = {name: cell for name, cell in _COLUMNS.items() if gpus or not name.startswith("GPU")}
    for name in shown:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for node in nodes:
        table.add_row(*(Text(cell(node)) for cell in shown.values()), style=_node_style(node))
    return table


def _node_style(node: NodeStatus) -> str:
    if node.stale or node.exit_codes:
        return "red"
    return "bold yellow" if node.straggler else ""


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%"


def _marks(node: NodeStatus) -> str:
    marks = [_slow(node)] if node.straggler else []
    marks += ["stale"] if node.stale else []
    marks += [f"exit {', '.join(map(str, node.exit_codes))}"] if node.exit_codes else []
    return " ".join(marks)


def _slow(node: NodeStatus) -> str:
    if not node.slow_ranks:
        return "slow"
    return f"slow: rank{'s' if len(node.slow_ranks) > 1 else ''} {rank_range(node.slow_ranks)}"


def rank_range(ranks: Sequence[int]) -> str:
    """Consecutive ranks as 0-3, others as 1,3."""
    if len(ranks) > 1 and all(after == before + 1 for before, after in pairwise(ranks)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) or "-"


_LEFT = ("host", "ranks", "phase", "")
_COLUMNS: dict[str, Callable[[NodeStatus], str]] = {
    "node": lambda node: str(node.node_rank),
    "host": lambda node: plain(node.host),
    "ranks": lambda node: rank_range(node.ranks),
    "phase": lambda node: plain(node.phase or "-"),
    "update": lambda node: number(node.updates, "d"),
    "step": lambda node: _seconds(node.step_seconds),
    "own": lambda node: _seconds(node.own_seconds),
    "to median": lambda node: "-" if node.ratio is None else f"{node.ratio:.2f}x",
    "CPU": lambda node: _percent(node.cpu_percent),
    "memory GiB": lambda node: memory(node.memory_used_bytes, node.memory_bytes),
    "GPU": lambda node: _percent(node.gpu_percent),
    "GPU memory GiB": lambda node: memory(node.gpu_memory_used_bytes, node.gpu_memory_total_bytes),
    "heartbeat": lambda node: "-" if node.heartbeat_seconds is None else f"{duration(node.heartbeat_seconds)} ago",
    "": _marks,
}
"""The cells of a node's row, by column name."""


def _excluded(status: RunStatus) -> list[str]:
    return [f"excluded: {host} {reason}" for host, reason in status.excluded_nodes.items()]


def _legend(status: RunStatus) -> list[str]:
    lines = [f"spare nodes, without ranks: {plain(', '.join(status.spare_nodes))}"] if status.spare_nodes else []
    if any(node.straggler for node in status.nodes) and status.compared:
        lines.append(f"slow: {_COMPARED[status.compared]} is above {STRAGGLER_RATIO:g}x the median of the nodes")
    if any(node.stale for node in status.nodes):
        lines.append(f"stale: its agent has written nothing for more than {STALE_SECONDS:.0f} s")
    return lines


def runs_view(runs: Sequence[RunStatus]) -> Group:
    """All runs, one line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "since", "update", "loss", "started (UTC)"):
        table.add_column(name, justify="right" if name in ("update", "loss", "since") else "left", no_wrap=True)
    for run in runs:
        if run.state == UNREADABLE:
            table.add_row(Text(run.name), Text("permission denied", style="dim"))
            continue
        total = "?" if run.total_updates is None else run.total_updates
        table.add_row(
            Text(run.name),
            Text(run.state, style=_STYLES.get(run.state, "cyan")),
            Text(f"{duration(run.state_seconds)} ago"),
            Text(f"{run.updates}/{total}"),
            Text(number(run.loss)),
            Text("-" if run.began is None else run.began[:19].replace("T", " ")),
        )
    parts: list[Table | Text] = [table]
    if any(run.state == LOST for run in runs):
        note = "lost: according to state.json the run is alive, but no launcher holds its lock"
        parts.append(Text(note, style="dim"))
    return Group(*parts)

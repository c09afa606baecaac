"""The Python stacks of the ranks of a node, from py-spy; and which ranks differ from the others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launcher.errors import os_error_text
from launcher.fleet.process import run_command
from launcher.run_dir import stacks_name, utc_now

_DUMP_SECONDS = 20.0
_COMPARED_FRAMES = 3
_COLLECTIVES = "torch/distributed/"
"""The folder of PyTorch's functions that wait for other ranks."""
_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "its process is stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "its process waits in the kernel, for a disk or a device",
}


@dataclass(frozen=True)
class RankStack:
    """The main thread of a rank: the innermost frames, each as "function (file:line)".

    `state` describes a process that cannot run, `problem` why there are no frames; each is None otherwise.
    """

    rank: int
    frames: tuple[str, ...] = ()
    state: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Difference:
    """The ranks that differ from the others, and a text that describes how."""

    ranks: tuple[int, ...]
    text: str


def write_stacks(pids: dict[int, int], folder: Path, attempt: int = 1) -> list[RankStack]:
    """Writes the stacks of all threads of the ranks (rank: process id) to a file in `folder`. Raises no OSError."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(lambda item: _dump(*item), pids.items()))
    text = "".join(f"{utc_now()} {_header(stack, pids[stack.rank])}\n{threads}\n" for stack, threads in found)
    stacks = [stack for stack, _ in found]
    try:
        (folder / stacks_name(attempt)).write_text(text)
    except OSError as error:
        print(f"the stacks could not be written: {os_error_text(error)}", file=sys.stderr)
    return stacks


def differing_ranks(stacks: Sequence[RankStack], name: Callable[[int], str]) -> Difference:
    """The ranks whose process cannot run; or else those whose innermost frames are not the majority's.

    `name` gives the name of a rank.
    """
    if unable := [stack for stack in stacks if stack.state]:
        text = ", ".join(f"{name(stack.rank)}: {stack.state}" for stack in unable)
        return Difference(tuple(stack.rank for stack in unable), text)
    groups: dict[tuple[str, ...], list[RankStack]] = defaultdict(list)
    for stack in stacks:
        if stack.frames:
            groups[stack.frames[:_COMPARED_FRAMES]].append(stack)
    if not groups:
        problems = sorted({stack.problem for stack in stacks if stack.problem})
        return Difference((), f"the stacks are not known: {'; '.join(problems) or 'no rank runs'}")
    ordered = sorted(groups.values(), key=len, reverse=True)
    if len(ordered) == 1:
        return Difference((), f"all stacks are equal, in {ordered[0][0].frames[0]}")
    if 2 * len(ordered[0]) <= sum(map(len, ordered)):
        if any(map(_waits, ordered)) and not all(map(_waits, ordered)):
            return _outside_of_collectives(ordered, name)
        parts = [f"{_names(group, name)} in {group[0].frames[0]}" for group in ordered[:4]]
        return Difference((), f"the stacks differ, without a majority: {'; '.join(parts)}")
    others = [stack for group in ordered[1:] for stack in group]
    parts = [f"{_names(group, name)} in {group[0].frames[0]}" for group in ordered[1:5]]
    text = f"{'; '.join(parts)}; the other {len(ordered[0])} ranks in {ordered[0][0].frames[0]}"
    return Difference(tuple(sorted(stack.rank for stack in others)), text)


def _outside_of_collectives(groups: Sequence[Sequence[RankStack]], name: Callable[[int], str]) -> Difference:
    busy = [group for group in groups if not _waits(group)]
    ranks = sorted(stack.rank for group in busy for stack in group)
    parts = [f"{_names(group, name)} in {group[0].frames[0]}" for group in busy[:4]]
    count = sum(map(len, groups)) - len(ranks)
    return Difference(tuple(ranks), f"{'; '.join(parts)}; the other ranks ({count}) wait in a collective")


def _waits(group: Sequence[RankStack]) -> bool:
    """Whether the ranks of a group, which have equal frames, wait in a collective."""
    return any(f"({_COLLECTIVES}" in frame for frame in group[0].frames[:_COMPARED_FRAMES])


def _names(stacks: Sequence[RankStack], name: Callable[[int], str]) -> str:
    names = [name(stack.rank) for stack in stacks[:4]]
    return ", ".join(names) + (f" and {len(stacks) - 4} more" if len(stacks) > 4 else "")


def _dump(rank: int, pid: int) -> tuple[RankStack, str]:
    """The stack of a rank's main thread, and the text of all its threads."""
    state = _STATES.get(_status(pid) or "")
    program = _program()
    if program is None:
        problem = "py-spy is not installed"
        return RankStack(rank, state=state, problem=problem), f"  {problem}\n"
    # Not paused while it is read: a process that is stopped already can be read too.
    command = (program, "dump", "--nonblocking", "--json", "--pid", str(pid))
    status: int | str
    try:
        status, output = run_command(command, os.environ, _DUMP_SECONDS)
    except OSError as error:
        status, output = os_error_text(error), ""
    threads = _threads(output) if status == 0 else None
    if threads is None:
        why = status if isinstance(status, str) else (output.strip().splitlines() or ["no output"])[0]
        problem = f"py-spy failed: {why.removeprefix('Error: ')}"
        return RankStack(rank, state=state, problem=problem), f"  {problem}\n"
    main = next((frames for thread, frames in threads if thread == pid), ())
    text = "".join(f"  thread {thread}\n" + "".join(f"    {frame}\n" for frame in frames) for thread, frames in threads)
    return RankStack(rank, main, state, None if main else "py-spy found no frames of the main thread"), text


def _threads(output: str) -> list[tuple[int, tuple[str, ...]]] | None:
    """The frames of each thread, by the kernel's number of the thread; None if the output is not py-spy's JSON."""
    try:
        return [(int(thread["os_thread_id"]), tuple(map(_frame, thread["frames"]))) for thread in json.loads(output)]
    except (ValueError, TypeError, KeyError):
        return None


def _frame(frame: dict[str, Any]) -> str:
    return f"{frame['name']} ({frame.get('short_filename') or frame['filename']}:{frame['line']})"


def _header(stack: RankStack, pid: int) -> str:
    return f"rank {stack.rank}, process {pid}{f', {stack.state}' if stack.state else ''}"


def _status(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return None


def _program() -> str | None:
    """py-spy where its package installed it, or on the PATH."""
    try:
        files = importlib.metadata.files("py-spy") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    installed = next((str(file.locate()) for file in files if file.name == "py-spy"), None)
    return installed or shutil.which("py-spy")

"""The stacks of real processes, and which of them differ."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.fleet import stacks as reading
from launcher.fleet.stacks import RankStack, differing_ranks, write_stacks
from tests.time_limit import TIME_LIMIT_SECONDS

CODE = """
import sys, time

def waits_for_peers():
    print("ready", flush=True)
    time.sleep(600)

def loops():
    print("ready", flush=True)
    while True:
        pass

{}()
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[str]], function: str) -> int:
    process = subprocess.Popen([sys.executable, "-c", CODE.format(function)], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process.pid


def name(rank: int) -> str:
    return f"rank {rank}"


def test_the_rank_that_loops_differs_from_those_that_wait(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    pids = {rank: start(started, "loops" if rank == 1 else "waits_for_peers") for rank in range(3)}
    stacks = write_stacks(pids, tmp_path)
    found = differing_ranks(stacks, name)
    assert found.ranks == (1,)
    assert found.text.startswith("rank 1 in loops (<string>:")
    assert "the other 2 ranks in waits_for_peers (<string>:" in found.text
    text = (tmp_path / "stacks.txt").read_text()
    assert all(f"rank {rank}, process {pid}" in text for rank, pid in pids.items())
    assert text.count("waits_for_peers") == 2


def test_a_stopped_process_is_named(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    pids = {rank: start(started, "waits_for_peers") for rank in range(2)}
    os.kill(pids[1], signal.SIGSTOP)
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while psutil.Process(pids[1]).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    found = differing_ranks(write_stacks(pids, tmp_path), name)
    assert (found.ranks, found.text) == ((1,), "rank 1: its process is stopped (SIGSTOP)")
    # It was only read: it is still stopped.
    assert psutil.Process(pids[1]).status() == psutil.STATUS_STOPPED


def test_a_process_that_has_ended_has_no_stack(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (stack,) = write_stacks({0: process.pid}, tmp_path)
    assert stack.frames == () and stack.problem is not None and stack.problem.startswith("py-spy failed")


def test_a_later_attempt_keeps_the_stacks_of_an_earlier_one(tmp_path: Path) -> None:
    for attempt in (1, 2):
        write_stacks({}, tmp_path, attempt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stacks.attempt-2.txt", "stacks.txt"]


def test_a_full_disk_is_printed(
    started: list[subprocess.Popen[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stacks.txt").symlink_to("/dev/full")
    (stack,) = write_stacks({0: start(started, "loops")}, tmp_path)
    assert stack.frames
    assert "No space left on device" in capsys.readouterr().err


def stack(rank: int, *frames: str) -> RankStack:
    return RankStack(rank, frames)


def test_equal_stacks_name_no_rank() -> None:
    found = differing_ranks([stack(rank, "all_reduce (x.py:1)", "step (y.py:2)") for rank in range(4)], name)
    assert (found.ranks, found.text) == ((), "all stacks are equal, in all_reduce (x.py:1)")


def test_without_a_majority_no_rank_is_named() -> None:
    found = differing_ranks([stack(0, "a"), stack(1, "b")], name)
    assert found.ranks == () and "without a majority: rank 0 in a; rank 1 in b" in found.text


def test_only_the_innermost_frames_count() -> None:
    same = ("wait", "all_reduce", "reduce")
    stacks = [stack(0, *same, "train"), stack(1, *same, "finish"), stack(2, "read", "next", "batches", "train")]
    assert differing_ranks(stacks, name).ranks == (2,)


def test_stacks_that_could_not_be_read_are_explained() -> None:
    found = differing_ranks([RankStack(0, problem="py-spy is not installed")], name)
    assert (found.ranks, found.text) == ((), "the stacks are not known: py-spy is not installed")


WAITS = (
    "all_reduce (torch/distributed/distributed_c10d.py:3252)",
    "_exception_logger.<locals>.wrapper (torch/distributed/c10d_logger.py:83)",
    "reduce (train.py:7)",
)
LOOPS = ("tokenise (data.py:3)", "batches (data.py:9)", "<module> (train.py:4)")


def test_of_two_ranks_the_one_outside_of_a_collective_is_named() -> None:
    found = differing_ranks([RankStack(0, WAITS), RankStack(1, LOOPS)], name)
    assert found.ranks == (1,)
    assert found.text == "rank 1 in tokenise (data.py:3); the other ranks (1) wait in a collective"


def test_ranks_in_different_collectives_are_not_told_apart() -> None:
    barrier = ("barrier (torch/distributed/distributed_c10d.py:5000)", *WAITS[1:])
    found = differing_ranks([RankStack(0, WAITS), RankStack(1, barrier)], name)
    assert found.ranks == ()
    assert "without a majority: rank 0 in all_reduce" in found.text and "rank 1 in barrier" in found.text


def test_a_rank_without_a_stack_is_not_counted_as_waiting() -> None:
    stacks = [RankStack(0, WAITS), RankStack(1, LOOPS), RankStack(2, problem="py-spy failed: no such process")]
    found = differing_ranks(stacks, name)
    assert found.ranks == (1,) and found.text.endswith("the other ranks (1) wait in a collective")


def test_a_majority_decides_before_collectives_do() -> None:
    found = differing_ranks([RankStack(0, LOOPS), RankStack(1, LOOPS), RankStack(2, WAITS)], name)
    assert found.ranks == (2,)


def test_a_py_spy_that_cannot_be_run_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "py-spy"
    program.write_bytes(b"for another processor")
    program.chmod(0o700)
    monkeypatch.setattr(reading, "_program", lambda: str(program))
    (stack,) = write_stacks({0: os.getpid()}, tmp_path)
    assert stack.problem is not None and "Exec format error" in stack.problem
    assert "Exec format error" in (tmp_path / "stacks.txt").read_text()
    assert differing_ranks([stack], name).text.startswith("the stacks are not known: py-spy failed: ")

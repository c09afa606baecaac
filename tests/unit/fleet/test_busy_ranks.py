"""Which ranks are named if the stacks have no majority, and a py-spy that cannot be run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.fleet import stacks as reading
from launcher.fleet.stacks import RankStack, differing_ranks, write_stacks

WAITS = (
    "all_reduce (torch/distributed/distributed_c10d.py:3252)",
    "_exception_logger.<locals>.wrapper (torch/distributed/c10d_logger.py:83)",
    "reduce (train.py:7)",
)
LOOPS = ("tokenise (data.py:3)", "batches (data.py:9)", "<module> (train.py:4)")


def name(rank: int) -> str:
    return f"rank {rank}"


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

"""How often each node failed in a run, and which nodes are excluded, over several launchers of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.runs.excluded_nodes import count_failures, exclude_node


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run")


def test_a_node_that_fails_a_second_time_is_excluded_and_reported(run: RunDir) -> None:
    assert count_failures(run, {"h1": "signal SIGKILL", "h2": "no answer for 20 s"}, 2) == {}
    assert run.excluded_nodes() == {}
    reason = "failed 2 times, the last time with signal SIGBUS"
    # Another launcher, which resumes the run, knows of the first failure.
    assert count_failures(RunDir(run.path), {"h1": "signal SIGBUS"}, 2) == {"h1": reason}
    assert RunDir(run.path).excluded_nodes() == {"h1": reason}
    assert [(event["host"], event["reason"]) for event in run.events()] == [("h1", reason)]


def test_with_a_limit_of_zero_failures_are_only_counted(run: RunDir) -> None:
    for _ in range(3):
        assert count_failures(run, {"h1": "signal SIGKILL"}, 0) == {}
    assert run.excluded_nodes() == {}
    assert run.node_failures()["h1"]["failures"] == ["signal SIGKILL"] * 3


def test_a_node_whose_check_failed_is_excluded_without_a_failure(run: RunDir) -> None:
    count_failures(run, {"h1": "signal SIGKILL"}, 2)
    exclude_node(run, "h2", "torch sees 3 of the 4 assigned GPUs")
    assert run.excluded_nodes() == {"h2": "torch sees 3 of the 4 assigned GPUs"}
    assert run.node_failures()["h1"] == {"failures": ["signal SIGKILL"], "excluded": None}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"h1": 3}', '{"h1": {"failures": "x"}}', '{"h1": {"failures": [1], "excluded": 2}}']
)
def test_damaged_entries_count_as_no_failures(run: RunDir, text: str) -> None:
    run.node_failures_file.write_text(text)
    assert run.excluded_nodes() == {}
    assert count_failures(run, {"h1": "signal SIGKILL"}, 2) == {}
    assert run.node_failures()["h1"]["failures"] == ["signal SIGKILL"]

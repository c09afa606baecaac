"""Which rank failed first."""

from __future__ import annotations

import errno
import pickle
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode, LauncherError, RequestError, RunFailed, code_of
from launcher.files import strip_times
from launcher.first_failure import error_in_log, traceback_time
from launcher.fleet.failures import Failure, all_failures, describe_exit, first_failure
from launcher.fleet.nodes import Node, Nodes
from launcher.job import LoadedJob
from launcher.plan.inputs import plan_inputs
from launcher.runs import run as run_module
from launcher.runs import supervisor as supervision
from launcher.runs.console import RunConsole
from launcher.runs.planning import CheckedJob
from launcher.runs.supervisor import Supervisor
from tests.unit.inputs import command, job_of, machine_facts, plan_of, preset
from tests.unit.run_directories import Built, rank, stamp


class Coded(RunFailed):
    """An error class with its own code."""

    code = FailureCode.OUT_OF_STEP


def failed(rank: int, time: float, message: str = "boom") -> dict[str, Any]:
    return {
        "report": "failed",
        "rank": rank,
        "node_rank": rank // 2,
        "time": time,
        "error": "ValueError",
        "message": message,
    }


def ended(rank: int, time: float, code: int) -> dict[str, Any]:
    return {"report": "exit", "rank": rank, "node_rank": rank // 2, "time": time, "code": code}


def test_nothing_failed() -> None:
    assert first_failure([]) is None
    assert first_failure([ended(0, 1.0, 0), {"report": "update", "rank": 0, "time": 0.5}]) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_exception_comes_before_ranks_that_failed_because_of_it(seed: int) -> None:
    events = [
        failed(3, 10.0),
        ended(3, 10.9, 1),
        ended(0, 10.4, -6),
        failed(1, 10.5, "Connection closed by peer"),
        ended(1, 10.8, 1),
        ended(2, 10.7, -15),
    ]
    random.Random(seed).shuffle(events)
    assert first_failure(events) == Failure(3, 1, 10.0, "exit code 1", "ValueError: boom", exit_code=1)


def test_a_kill_has_no_exception() -> None:
    assert first_failure([ended(1, 5.0, -9), failed(0, 5.2)]) == Failure(
        1, 0, 5.0, "signal SIGKILL", exit_code=-9, code=FailureCode.RANK_KILLED
    )


def test_the_reported_code_wins_over_the_exit_status() -> None:
    coded = failed(0, 5.0) | {"code": "out_of_step"}
    for exit_code in (1, -9, -15):
        found = first_failure([coded, ended(0, 5.5, exit_code)])
        assert found is not None and (found.code, found.exit_code) == (FailureCode.OUT_OF_STEP, exit_code)
    # An exception of a library has no code, and the SIGKILL after the grace time does not change that.
    found = first_failure([failed(0, 5.0), ended(0, 5.5, -9)])
    assert found is not None and found.code is FailureCode.UNKNOWN


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("a", code=FailureCode.NETWORK), "network"),
        (RunFailed("a"), "unknown"),
        (Coded("a"), "out_of_step"),
        (Coded("a", code=FailureCode.PLAN_DIFFERS), "plan_differs"),
        (RequestError("a"), "user_error"),
        (OSError(errno.ENOSPC, "a"), "disk_full"),
        (OSError(errno.EDQUOT, "a"), "disk_full"),
        (PermissionError(errno.EACCES, "a"), "permission"),
        (FileNotFoundError(errno.ENOENT, "a"), "missing_file"),
        (OSError("without a number"), "unknown"),
        (MemoryError(), "out_of_memory"),
        (ValueError("a"), "unknown"),
    ],
)
def test_every_error_has_a_code(error: BaseException, code: str) -> None:
    assert code_of(error) == code
    # Errors travel from an agent through Ray.
    again = pickle.loads(pickle.dumps(error))
    assert (code_of(again), str(again)) == (code, str(error))


def test_an_exception_is_a_failure_before_the_exit_is_known() -> None:
    assert first_failure([failed(2, 5.0)]) == Failure(2, 1, 5.0, "an exception", "ValueError: boom")


def test_a_lost_node_is_a_failure_without_a_rank() -> None:
    lost = {"report": "node-lost", "node_rank": 1, "time": 3.0, "message": "no answer"}
    found = first_failure([ended(1, 4.0, 1), lost])
    assert found == Failure(None, 1, 3.0, "the node's agent is gone: no answer", code=FailureCode.NODE_LOST)


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exit code 0"), (2, "exit code 2"), (-11, "signal SIGSEGV"), (-99, "signal 99")]
)
def test_exit_statuses_are_described(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_a_killed_rank_is_first_though_a_peer_reported_its_loss_slightly_earlier() -> None:
    lost = failed(0, 10.0, "[gloo] Connection closed by peer [127.0.0.1]:4242")
    found = all_failures([lost, ended(1, 10.05, -9), ended(0, 10.4, 1)])
    assert [(failure.rank, failure.how) for failure in found] == [(1, "signal SIGKILL"), (0, "exit code 1")]
    # A kill much later is a separate failure.
    assert [failure.rank for failure in all_failures([lost, ended(1, 19.0, -9)])] == [0, 1]


def test_times_are_corrected_by_clock_offsets() -> None:
    # Node 1's clock is five seconds ahead.
    found = all_failures([failed(0, 101.0), failed(2, 105.5)], [0.0, 5.0])
    assert [(failure.rank, failure.time) for failure in found] == [(2, 100.5), (0, 101.0)]


NCCL = "[rank{}]:[E ProcessGroupNCCL.cpp:607] [Rank {}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9"


class ScriptedNodes(Nodes):
    """Two nodes whose reports are given: one list per call of `reports`."""

    def __init__(self, *batches: list[dict[str, Any]]) -> None:
        self.nodes = [Node(None, f"h{rank}", f"10.0.0.{rank}", ()) for rank in range(2)]
        self._batches = list(batches)

    def reports(self, timeout_seconds: float) -> list[dict[str, Any]]:
        del timeout_seconds
        return self._batches.pop(0) if self._batches else []

    def end(self, grace_seconds: float) -> None:
        """Nothing runs here."""


class RecordingConsole:
    """A console that shows nothing and keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


class Placed(Supervisor):
    """A supervisor whose ranks are already running."""

    def place(self) -> None:
        """The nodes are given."""

    def start(self, start: Any) -> None:
        """The ranks are running."""


def supervised(built: Built, *batches: list[dict[str, Any]]) -> Supervisor:
    """The supervisor of eight ranks on two nodes, placed."""
    plan = plan_of(job_of(cluster={"nodes": 2, "gpus_per_node": 4}), machine=machine_facts(4))
    found = Placed(plan, built.run.plan_file, built.run, RecordingConsole())
    found.nodes = ScriptedNodes(*batches)
    return found


def on_eight(rank_number: int, time: float, code: int) -> dict[str, Any]:
    return {"report": "exit", "rank": rank_number, "node_rank": rank_number // 4, "time": time, "code": code}


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path / "runs")


def test_after_a_time_out_late_aborts_are_awaited_and_the_absent_rank_is_named(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's watchdogs abort within some seconds of each other; an abort in C++ sends no report to the agent."""
    monkeypatch.setattr(supervision, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(supervision, "_LOST_NODE_SECONDS", 0.5)
    built.nodes(["h0", "h1"])
    built.state("training", 5.0)
    for number in (0, 1, 2, 3, 4, 6, 7):
        built.log(number // 4, f"h{number // 4}", f"rank-{number}", (39.0, NCCL.format(number, number)), (39.1, "what"))
    for node in range(2):
        built.node_json(node, f"h{node}", 38.0, [rank(4 * node + local) for local in range(4)])
    first, *late = ([on_eight(number, 40.0 + number, -6)] for number in (0, 1, 2, 3, 4, 6, 7))
    with pytest.raises(RunFailed) as ended:
        supervised(built, first, [], *late).follow()
    headline = "a collective timed out; these ranks did not join it: rank 5 on node 1 (h1)"
    assert str(ended.value).startswith(f"{headline}\n  the end of {built.run.node_logs(0, 'h0') / 'rank-0.log'}:")
    (failure,) = [event for event in built.run.events() if event["event"] == "failure"]
    assert [one["rank"] for one in failure["failures"]] == [0, 1, 2, 3, 4, 6, 7]
    assert all("Watchdog caught" in one["error"] for one in failure["failures"])
    assert ended.value.code == failure["code"] == failure["failures"][6]["code"] == "timeout"
    assert failure["exit_code"] == -6
    built.state("failed", 50.0, reason=str(ended.value).splitlines()[0])
    assert command("why", str(built.run.path)).out.startswith(f"{headline}\n")


def test_a_failure_in_the_same_batch_as_a_lost_peer_is_the_first(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank of the first node notices at once, and both reports arrive together."""
    monkeypatch.setattr(supervision, "_SETTLE_SECONDS", 0.0)
    lost = failed(0, 40.01, "[gloo] Connection closed by peer [10.0.0.1]:4242")
    batch = [lost, failed(4, 40.0, "a bad sample") | {"node_rank": 1}]
    with pytest.raises(RunFailed) as ended:
        supervised(built, batch).follow()
    first = "rank 4 on node 1 (h1) failed first, with an exception: ValueError: a bad sample"
    assert str(ended.value).splitlines()[0] == first


def test_a_full_disk_does_not_hide_the_failure(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_SETTLE_SECONDS", 0.0)
    built.run.events_file.unlink()
    built.run.events_file.symlink_to("/dev/full")
    built.log(1, "h1", "rank-4", (39.0, "OSError: [Errno 28] No space left on device"))
    supervisor = supervised(built, [on_eight(4, 40.0, 1)])
    with pytest.raises(RunFailed, match=r"rank 4 on node 1 \(h1\) failed first, with exit code 1\n.*\n.*No space left"):
        supervisor.follow()
    # The error while writing is printed as a note.
    (note,) = supervisor.console.notes  # type: ignore[attr-defined]
    assert "the failure could not be written to" in note and "No space left on device" in note
    assert stamp(39.0) in built.run.node_logs(1, "h1").joinpath("rank-4.log").read_text()


class Broken(ScriptedNodes):
    """Nodes whose Ray is gone."""

    def end(self, _grace_seconds: float) -> None:
        raise ConnectionError("Ray does not answer")

    def close(self) -> None:
        raise ConnectionError("Ray is gone")


def test_errors_after_a_failure_are_printed_and_do_not_hide_it(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_SETTLE_SECONDS", 0.0)
    supervisor = supervised(built)
    supervisor.nodes = Broken([failed(4, 40.0, "a bad sample") | {"node_rank": 1}])
    with pytest.raises(RunFailed, match=r"^rank 4 on node 1"):
        supervisor.run()
    assert [note.strip() for note in supervisor.console.notes] == [  # type: ignore[attr-defined]
        "the ranks could not be ended: Ray does not answer",
        "the nodes could not be released: Ray is gone",
    ]
    assert [event["event"] for event in built.run.events()][-1] == "failure"


def test_a_failure_that_cannot_be_written_is_still_raised(
    built: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(_job: Any, **_options: Any) -> Any:
        built.run.events_file.unlink()
        built.run.events_file.symlink_to("/dev/full")
        raise LauncherError("the first error", code=FailureCode.PREPARE_FAILED)

    monkeypatch.setattr(run_module, "make_plan", make)
    checked = CheckedJob(LoadedJob(job_of(), "the job"), plan_inputs(job_of(), preset("zero2"), machine_facts(8)), ())
    with pytest.raises(LauncherError, match=r"^the first error$") as raised:
        run_module._planned(checked, built.run, RunConsole())
    assert (raised.value.exit_status, raised.value.code) == (1, "prepare_failed")
    printed = " ".join(capsys.readouterr().out.split())
    assert "the failure could not be written to" in printed and "No space left on device" in printed
    assert built.run.state()["code"] == "prepare_failed"


def test_the_time_of_an_exception_is_that_of_its_traceback_not_of_the_exit() -> None:
    log = [
        "2026-01-02T03:04:05.500Z step 1",
        "2026-01-02T03:04:06.250Z [rank1]: Traceback (most recent call last):",
        "2026-01-02T03:04:06.251Z [rank1]: ValueError: no such file",
        "2026-01-02T03:04:09.000Z terminate called without an active exception",
    ]
    assert error_in_log(strip_times(log), -6)[0] == "ValueError: no such file"
    raised = datetime(2026, 1, 2, 3, 4, 6, 250_000, UTC).timestamp()
    assert [traceback_time(log, exit_code) for exit_code in (1, -6)] == [raised, raised]
    # An exception that was handled long ago did not end a rank that was killed or ordered to end.
    assert [traceback_time(log, exit_code) for exit_code in (-9, -15, 113)] == [None] * 3
    assert traceback_time(log[:1], 1) is None and traceback_time(strip_times(log), 1) is None

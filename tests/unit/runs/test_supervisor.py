"""How the supervisor reports and writes a failure of its ranks."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode, RunFailed
from launcher.fleet import nodes as nodes_module
from launcher.fleet.agent import NodeTask
from launcher.fleet.fork_traits import differing_variables
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.nodes import Node, Nodes
from launcher.fleet.preflight import NodeCheck, NodeProblem
from launcher.runs import supervisor as supervision
from launcher.runs.supervisor import Supervisor
from tests.unit.inputs import command, job_of, machine_facts, plan_of
from tests.unit.run_directories import Built, rank, stamp


def failed(rank: int, time: float, message: str = "boom") -> dict[str, Any]:
    return {
        "report": "failed",
        "rank": rank,
        "node_rank": rank // 2,
        "time": time,
        "error": "ValueError",
        "message": message,
    }


NCCL = "[rank{}]:[E ProcessGroupNCCL.cpp:607] [Rank {}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9"


class ScriptedNodes(Nodes):
    """Two nodes whose reports are given: one list per call of `reports`."""

    def __init__(self, *batches: list[dict[str, Any]]) -> None:
        super().__init__(NodeResources(nodes=2, cpus=4, gpus=4), print)
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
    return Placed(plan, built.run.plan_file, built.run, RecordingConsole(), ScriptedNodes(*batches))


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


@pytest.mark.parametrize(
    ("code", "of_devices"),
    [(FailureCode.NODE_UNFIT, True), (FailureCode.NODE_FAULTY, True), (FailureCode.VERSIONS_DIFFER, False)],
)
def test_a_node_whose_devices_are_unfit_is_excluded_from_the_run(
    built: Built, monkeypatch: pytest.MonkeyPatch, code: FailureCode, of_devices: bool
) -> None:
    """There is no spare node, so the attempt fails. A node with another problem may be used again."""
    supervisor = supervised(built)
    no_facts: Any = None
    checks = [NodeCheck(rank, node, no_facts) for rank, node in enumerate(supervisor.nodes.nodes)]
    checks[1].problems.append(NodeProblem(code, "what is wrong"))
    # GPUs are needed for a real one.
    monkeypatch.setattr(supervision, "preflight", lambda *_: checks)
    with pytest.raises(RunFailed, match=r"node 1 \(h1\): what is wrong") as raised:
        supervisor.check_nodes()
    assert raised.value.code is code
    excluded = {"h1": "what is wrong"} if of_devices else {}
    assert supervisor.nodes.excluded == built.run.excluded_nodes() == excluded
    reported = [event["host"] for event in built.run.events() if event["event"] == "node_excluded"]
    assert reported == list(excluded)


def test_a_problem_of_all_nodes_excludes_none(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = supervised(built)
    no_facts: Any = None
    problem = NodeProblem(FailureCode.NODE_UNFIT, "torch sees 0 of the 4 assigned GPUs")
    checks = [NodeCheck(rank, node, no_facts, [problem]) for rank, node in enumerate(supervisor.nodes.nodes)]
    monkeypatch.setattr(supervision, "preflight", lambda *_: checks)
    with pytest.raises(RunFailed):
        supervisor.check_nodes()
    assert supervisor.nodes.excluded == built.run.excluded_nodes() == {}


def test_spare_nodes_begin_the_imports_of_ranks_too(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that the ranks of a node can be forks of: its environment differs only where that is read later."""
    supervisor = supervised(built)
    supervisor.nodes.spares = [Node(None, "h2", "10.0.0.2", (), interface="eth2")]
    asked: list[tuple[str, str, NodeTask]] = []

    def call(nodes: Sequence[Node], method: str, arguments: Sequence[tuple[NodeTask, None]], _: float) -> None:
        asked.extend((node.host, method, task) for node, (task, _) in zip(nodes, arguments, strict=True))

    monkeypatch.setattr(nodes_module, "call_agents", call)
    supervisor.prepare_forks()
    run = built.run
    folders = {"h0": run.node_logs(0, "h0"), "h1": run.node_logs(1, "h1"), "h2": run.spare_logs("h2")}
    assert {host: Path(task.log_folder) for host, _, task in asked} == folders
    assert {method for _, method, _ in asked} == {"prepare_forks"}
    *_, (_, _, of_node), (_, _, of_spare) = asked
    assert of_node.environment != of_spare.environment
    assert differing_variables(of_node.environment, of_spare.environment) == []


def test_a_full_disk_at_a_change_of_phase_waits_for_the_error_of_a_rank(built: Built, monkeypatch) -> None:
    def enter(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    supervisor = supervised(built, [phase("saving", 4)], [failed(3, 10.0, "[Errno 28] No space left on device")])
    monkeypatch.setattr(type(supervisor.run_dir), "enter", enter)
    with pytest.raises(RunFailed, match="rank 3 on node 1") as caught:
        supervisor.run()
    assert caught.value.code == "disk_full"
    assert any("state.json could not be written" in note for note in supervisor.console.notes)  # type: ignore[attr-defined]


class Drained:
    """A watch of Ray's drains that names the second node."""

    def deadline_of(self, address: str) -> float | None:
        return 0.0 if address == "10.0.0.1" else None

    def end(self) -> None:
        """No thread runs."""


def phase(name: str, update: int) -> dict[str, Any]:
    return {"report": "phase", "phase": name, "update": update, "rank": 0, "node_rank": 0, "time": 0.0}


def stopped(update: int, reason: str | None = None) -> dict[str, Any]:
    return {"report": "stopped", "update": update, "reason": reason, "rank": 0, "node_rank": 0, "time": 0.0}


def drained(built: Built, *batches: list[dict[str, Any]]) -> tuple[Supervisor, list[Any]]:
    """A supervisor of nodes of which Ray drains the second, and the orders that it sends."""
    supervisor, orders = supervised(built, *batches), []
    supervisor.nodes.order = orders.append  # type: ignore[method-assign]
    supervisor._drain_watch = Drained()  # type: ignore[assignment]
    return supervisor, orders


def test_the_ranks_save_and_stop_when_ray_drains_a_node(built: Built) -> None:
    ended = [on_eight(number, 0.0, 0) for number in range(8)]
    supervisor, orders = drained(built, [phase("training", 3)], [], [phase("saving", 4), stopped(4), *ended])
    with pytest.raises(RunFailed) as failed:
        supervisor.run()
    assert str(failed.value) == "node 1 (h1) is lost: Ray drains it" and failed.value.code == "node_drained"
    assert orders == [{"stop": True}]
    (failure,) = [event for event in built.run.events() if event["event"] == "failure"]
    assert (failure["host"], failure["code"], failure["rank"]) == ("h1", "node_drained", None)


def test_a_drain_does_not_change_why_a_run_ends_otherwise(built: Built) -> None:
    ended = [on_eight(number, 0.0, 0) for number in range(8)]
    supervisor, _ = drained(built, [phase("training", 3)], [], [stopped(4), *ended])
    supervisor.stop_signal = 15
    assert supervisor.run().state == "stopped"
    supervisor, _ = drained(built, [phase("training", 3)], [], [stopped(4, "the loss is NaN"), *ended])
    assert supervisor.run().reason == "the loss is NaN"
    supervisor, orders = drained(built, [phase("exporting", 3)], [], ended)
    assert supervisor.run().state == "finished" and orders == []


def test_an_early_stop_finishes_the_run_with_its_reason(built: Built) -> None:
    details = {"update": 4, "reason": "early stopping: no improvement", "best_update": 1, "best_loss": 2.0}
    event = {"report": "event", "event": "early_stop", "details": details, "rank": 0, "node_rank": 0, "time": 0.0}
    ended = [on_eight(number, 0.0, 0) for number in range(8)]
    supervisor = supervised(built, [event], [phase("saving", 4)], ended)
    outcome = supervisor.run()
    assert (outcome.state, outcome.updates, outcome.reason) == ("finished", 4, "early stopping: no improvement")
    assert outcome.code is None
    assert any("early stop: early stopping: no improvement" in note for note in supervisor.console.notes)  # type: ignore[attr-defined]


def test_a_save_that_takes_longer_than_slurms_signal_allows_is_reported_once(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"report": "event", "event": "checkpoint", "details": {"update": 4, "samples": 32}, "time": 0.0}
    built.event(60.0, "state", state="saving")
    ended = [on_eight(number, 0.0, 0) for number in range(8)]
    supervisor = supervised(built, [saved], [saved], ended)
    supervisor.run()
    assert supervisor.console.notes == []  # type: ignore[attr-defined]
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    supervisor = supervised(built, [saved], [saved], ended)
    supervisor.run()
    (note,) = supervisor.console.notes  # type: ignore[attr-defined]
    assert "but Slurm signals only 300 s before the time limit (slurm.signal_seconds)" in note
    assert note.endswith("set slurm.signal_seconds=65535")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("CUDA out of memory. Tried to allocate 22.00 MiB", "out_of_gpu_memory"),
        ("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598", "disk_full"),
        ("odd rows", "unknown"),
    ],
)
def test_a_failure_without_a_code_has_that_of_its_message(built: Built, message: str, code: str) -> None:
    """The restart policy depends on it."""
    with pytest.raises(RunFailed) as caught:
        supervised(built, [failed(0, 10.0, message)]).run()
    assert caught.value.code == code


@pytest.mark.parametrize(("counted", "code"), [({"oom_kills": 1}, "out_of_memory"), ({}, "rank_killed")])
def test_a_rank_that_the_kernel_killed_for_lack_of_memory(built: Built, counted: dict[str, int], code: str) -> None:
    built.node_json(1, "h1", 9.0, [rank(5)], **counted)
    with pytest.raises(RunFailed) as caught:
        supervised(built, [on_eight(5, 10.0, -9)]).run()
    assert caught.value.code == code
    assert str(caught.value).startswith("rank 5 on node 1 (h1) failed first, with signal SIGKILL")
    assert ("from the kernel for lack of memory" in str(caught.value)) == bool(counted)

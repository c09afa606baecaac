"""The messages, lines and files of the real writers have the keys of their records."""

from __future__ import annotations

import json
import math
import os
import queue
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from launcher import records
from launcher.errors import FailureCode
from launcher.fleet import heartbeat
from launcher.fleet.failures import Failure
from launcher.fleet.heartbeat import Heartbeat
from launcher.fleet.process import RankProcess, stop_all
from launcher.run_dir import STATES, RunDir, read_manifest, write_manifest
from launcher.worker.metrics import MetricsWriter
from tests.time_limit import TIME_LIMIT_SECONDS

RANK = """
import os, sys, time
import launcher
from launcher.records import ReadyReport
from launcher.worker.control import Control
control = Control(int(os.environ["LAUNCHER_REPORT_FD"]))
os.environ["LAUNCHER_REPORT_PID"] = str(os.getpid())
control.report(ReadyReport(report="ready", time=time.time()))
assert control.wait_for_go() == {"env": {"A": "1"}}
control.record_event({"event": "checkpoint", "update": 2, "samples": 16})
launcher.report(step=0, loss=2.5, lr=1e-3, tokens=100)
launcher.report(step=1, loss=float("nan"), lr=1e-3, tokens=100, accuracy=0.5)
control.stop.wait()
sys.exit(7)
"""


def check(found: Mapping[str, Any], record: Any) -> None:
    """All required keys are there, and no unknown ones."""
    missing, unknown = record.__required_keys__ - set(found), set(found) - set(record.__annotations__)
    assert (missing, unknown) == (set(), set()), record.__name__


def by_kind(union: Any, key: str) -> dict[str, Any]:
    """The records of a union by the value of the key that tells them apart."""
    found = {get_args(get_type_hints(record)[key])[0]: record for record in get_args(union)}
    assert len(found) == len(get_args(union)), "two records have the same kind"
    return found


EVENTS, REPORTS = by_kind(records.RunEvent, "event"), by_kind(records.Report, "report")


def events_of(run: RunDir) -> list[dict[str, Any]]:
    """The events without their time, each checked against its record."""
    found = run.events()
    for event in found:
        assert next(iter(event)) == "time"
        del event["time"]
        check(event, EVENTS[event["event"]])
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "tiny")


def test_kinds_of_reports() -> None:
    assert set(by_kind(records.RankReport, "report")) == set(records._RANK_REPORTS)
    assert set(REPORTS) - set(records._RANK_REPORTS) == {"exit", "node-lost"}


@pytest.mark.parametrize(
    "line", [b"", b"{", b"5", b"[]", b"{}", b'{"report": "exit"}', b'{"report": ["ready"]}', b"\xff"]
)
def test_a_line_that_is_not_a_report_of_a_rank(line: bytes) -> None:
    assert records.parse_report(line) is None


def test_state_and_stop_request(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    for state in STATES:
        run.enter(state)
        check(run.state(), records.StateRecord)
    run.enter("failed", update=3, reason="no room", message="no room\nat all", code=FailureCode.DISK_FULL)
    assert set(run.state()) == set(records.StateRecord.__annotations__)
    assert set(events_of(run)[-1]) == set(records.StateEvent.__annotations__)
    run.request_stop(now=True)
    check(run.stop_request() or {}, records.StopRequest)


def test_events(run: RunDir) -> None:
    run.event({"event": "plan", "sha256": "0", "updates": 8})
    failure = Failure(1, 0, 5.0, "exit code 1", exit_code=1)
    check(failure.record("h0"), records.FailedRank)
    run.rank_event({"report": "event", "time": 0.0, "event": "outlier", "details": {"update": 4, "reason": "odd"}})
    assert events_of(run) == [
        {"event": "plan", "sha256": "0", "updates": 8},
        {"event": "outlier", "update": 4, "reason": "odd"},
    ]


def test_manifest(run: RunDir) -> None:
    folder = run.checkpoint(2)
    folder.mkdir()
    write_manifest(folder, world_size=2, update=2, samples=16, plan_sha256="0")
    check(read_manifest(folder) or {}, records.Manifest)


@pytest.mark.parametrize("router_loss", [None, 0.5])
def test_metrics_and_evaluations(run: RunDir, router_loss: float | None) -> None:
    ranks: Any = SimpleNamespace(first=True, device=SimpleNamespace(type="cpu"))
    writer = MetricsWriter(run, ranks)
    numbers = {"loss": math.nan, "lr": 1e-3, "grad_norm": None, "router_loss": router_loss, "data_seconds": 0.0}
    writer.write(update=0, samples=8, tokens=64, skipped=False, **numbers)
    writer.write_evaluation(1, 2.5, math.inf, 64)
    (line,), (evaluation,) = run.metrics(), run.evaluations()
    check(line, records.MetricsLine)
    assert line["loss"] == "nan" and ("router_loss" in line) == (router_loss is not None)
    check(evaluation, records.EvaluationLine)
    other: Any = SimpleNamespace(first=False, device=ranks.device)
    MetricsWriter(run, other).write(update=1, samples=16, tokens=64, skipped=False, **numbers)
    assert len(run.metrics()) == 1, "only the first rank writes"


Rank = tuple[RankProcess, "queue.Queue[dict[str, Any]]"]


@pytest.fixture
def rank(run: RunDir) -> Iterator[Rank]:
    """A process that reports as ranks and scripts do, and the reports that its agent receives."""
    received: queue.Queue[Any] = queue.Queue()
    environment = {**os.environ, "RANK": "0", "LAUNCHER_RUN_DIR": str(run.path), "LAUNCHER_TRAIN_BATCH_SIZE": "8"}
    process = RankProcess(3, [sys.executable, "-c", RANK], environment, run.path / "rank.log", received.put)
    yield process, received
    stop_all([process], 0.0)


def test_reports_and_heartbeat(run: RunDir, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_FIRST_SECONDS", 0.0)
    process, received = rank
    beat = Heartbeat(run.path, {"node_rank": 0, "host": "h0", "address": "10.0.0.1", "interface": None, "attempt": 1})
    beat.begin([process])
    process.order({"go": {"env": {"A": "1"}}})
    process.order({"stop": True})
    reports: list[Any] = []
    while not reports or reports[-1]["report"] != "exit":
        reports.append(received.get(timeout=TIME_LIMIT_SECONDS))
        check(reports[-1], REPORTS[reports[-1]["report"]])
        assert reports[-1]["rank"] == 3
        beat.receive(reports[-1])
    log = (run.path / "rank.log").read_text()
    assert [report["report"] for report in reports] == ["ready", "event", "update", "update", "exit"], log
    assert reports[-1]["code"] == 7, log
    event = reports[1]
    assert {"event": event["event"], **event["details"]} == {"event": "checkpoint", "update": 2, "samples": 16}
    for line in run.metrics():
        line.pop("accuracy", None)
        check(line, records.ScriptMetricsLine)

    beat.end()
    node = json.loads((run.path / "node.json").read_text())
    check(node, records.NodeRecord)
    (found,) = node["ranks"]
    check(found, records.RankRecord)
    assert (found["rank"], found["exit_code"], found["updates"]) == (3, 7, 2)
    for gpu in node["gpus"]:
        check(gpu, records.GpuRecord)

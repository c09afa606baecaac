"""Random content in the files of a run directory: no command ends with a traceback, or with a long message."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from launcher.lr_report.plan_report import run_report
from launcher.lr_report.report import report_json
from launcher.manifest import MANIFEST, write_manifest
from launcher.runs.checkpoints import checkpoints_json, checkpoints_view, list_checkpoints
from launcher.runs.console import RunConsole
from launcher.runs.rest import rest_of
from launcher.watch.log_files import LogSelection
from launcher.watch.print_logs import print_logs
from launcher.watch.status import read_status, read_status_for_list
from launcher.watch.status_report import one_line, runs_view, status_json, status_view
from launcher.watch.why import explain, why_view
from tests.unit.fuzz.mutations import as_json, damaged, inputs, mutated, only_launcher_errors
from tests.unit.inputs import in_format_1, job_of, plan_of
from tests.unit.run_directories import START, Built, rank

KILLED = {"rank": 1, "node_rank": 0, "host": "h0", "how": "signal SIGKILL", "exit_code": -9, "code": "rank_killed"}
GPU = {"utilization_percent": 5.0, "memory_used_bytes": 1, "memory_bytes": 2}
PLAN = plan_of(job_of(train={"max_steps": 20}))
NAMES = ("/etc/passwd", "../states", "a/../../b", "", ".", "states/x", "x" * 5000, "\x00", "\ud800", "manifest.json")


@pytest.fixture
def built(tmp_path: Path) -> Built:
    made = Built(tmp_path / "runs")
    made.run.plan_file.write_text(PLAN.to_json())
    made.nodes(["h0", "h1"])
    made.event(2.0, "warmup_extended", update=1, warmup_updates=4, peak_lr=1e-5)
    made.event(3.0, "spike", update=1, loss=9.0, action="warn")
    for node in range(2):
        ranks = [rank(2 * node, own_seconds=0.5, phase="saving"), rank(2 * node + 1, exit_code=-9)]
        made.node_json(node, f"h{node}", 50.0, ranks, gpus=[GPU], oom_kills=0, memory_peak_bytes=1)
        made.log(node, f"h{node}", f"rank-{2 * node}", (5.0, "loss 3.0"), "RuntimeError: x", torn="half")
    made.metrics(range(3))
    made.run.evaluations_file.write_text('{"update": 0, "loss": 3.0, "samples": 8}\n{"update": 2, "loss": "NaN"}\n')
    made.failure(55.0, KILLED, {**KILLED, "rank": 0, "exit_code": 1, "error": "RuntimeError: x", "traceback": "x"})
    made.state("failed", 56.0, reason="rank 1", message="rank 1", code="rank_killed")
    for update in (1, 2):
        folder = made.run.checkpoint(update)
        folder.mkdir(parents=True)
        (folder / "states").write_bytes(b"states")
        write_manifest(folder, update=update, samples=8 * update, world_size=8, plan_sha256=PLAN.sha256)
    return made


FILES = (
    *("state.json", "events.jsonl", "metrics.jsonl", "evaluations.jsonl", "plan.json", "stop.json", "launcher.lock"),
    *("logs/node-0-h0/node.json", "logs/node-0-h0/rank-0.log", f"checkpoints/update-2/{MANIFEST}"),
)


def changed(random: Random, text: bytes, name: str) -> bytes:
    """The content of a file with random changes: of its bytes, or of one of its records."""
    if name.endswith(".log") or random.random() < 0.4 or not text:
        return damaged(random, text)
    if not name.endswith("l"):
        return as_json(mutated(random, json.loads(text)))
    lines = text.splitlines()
    at = random.randrange(len(lines))
    lines[at] = as_json(mutated(random, json.loads(lines[at])))
    return b"\n".join((*lines, b""))


def read_all(built: Built, given: Any) -> None:
    """Everything that `status`, `why`, `logs`, `lr`, `checkpoints` and the planning of `resume` read."""
    run, view = built.run, io.StringIO()
    console = Console(file=view, width=200)
    with only_launcher_errors(given):
        status = read_status(run, START + 60.0)
        shown = [status_view(status), runs_view([status, read_status_for_list(run, START + 60.0)]), one_line(status)]
        console.print(*shown)
        status_json(status).encode()
    with only_launcher_errors(given):
        console.print(why_view(explain(run)))
    with only_launcher_errors(given):
        print_logs(run, LogSelection(), lambda _: True, None, 50)
    with only_launcher_errors(given):
        found = list_checkpoints(run, lambda _: None)
        console.print(checkpoints_view(found))
        checkpoints_json(found).encode()
    with only_launcher_errors(given):
        report_json(run_report(run.path, ())).encode()
    with only_launcher_errors(given):
        rest_of(run, [], RunConsole(Console(file=view)))
    assert "\x1b" not in view.getvalue(), given
    lone = [line for line in view.getvalue().splitlines() if line != line.encode(errors="replace").decode()]
    assert not lone, (given, lone)


def test_one_damaged_file(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    for number, random in enumerate(inputs("run files", 800)):
        name = FILES[number % len(FILES)]
        file = built.run.path / name
        before = file.read_bytes() if file.exists() else b'{"time": "2026-03-01T12:00:00.000Z", "now": false}'
        text = changed(random, before, name)
        file.write_bytes(text)
        read_all(built, (name, text))
        capsys.readouterr()
        file.write_bytes(before)


def test_manifests(built: Built) -> None:
    """Names that leave the folder or cannot be opened, huge sizes, wrong types, duplicate keys."""
    file = built.run.checkpoint(2) / MANIFEST
    manifest = json.loads(file.read_text())
    for random in inputs("manifests", 1500):
        made = mutated(random, manifest) if random.random() < 0.7 else json.loads(json.dumps(manifest))
        if isinstance(made, dict) and isinstance(made.get("files"), dict) and random.random() < 0.5:
            made["files"][random.choice(NAMES)] = random.choice((manifest["files"]["states"], 6, 10**30, None))
        text = as_json(made)
        if random.random() < 0.2:
            text = text.replace(b'"files": {', b'"files": {"states": 1, "states": {}, ') + b"\n"
        if random.random() < 0.3:
            text = damaged(random, text)
        file.write_bytes(text)
        with only_launcher_errors(text):
            found = list_checkpoints(built.run, lambda _: None)
            checkpoints_json(found).encode()
            assert [each.state for each in found if each.name == "update-1"] == ["verified"]
        with only_launcher_errors(text):
            rest_of(built.run, [], RunConsole(Console(file=io.StringIO())))


def test_plans(built: Built) -> None:
    """Also those of the first format, whose keys are converted."""
    plans = (json.loads(PLAN.to_json()), in_format_1(PLAN))
    for random in inputs("plans", 500):
        made = mutated(random, random.choice(plans))
        if isinstance(made, dict) and isinstance(made.get("plan"), dict):
            made["plan"] = mutated(random, made["plan"])
        built.run.plan_file.write_bytes(as_json(made))
        read_all(built, made)


def test_the_unchanged_directory_is_read(built: Built) -> None:
    assert [each.state for each in list_checkpoints(built.run, lambda _: None)] == ["verified", "verified"]
    assert rest_of(built.run, [], RunConsole(Console(file=io.StringIO()))).start.update == 2
    assert read_status(built.run, START + 60.0).state == "failed"
    shutil.rmtree(built.run.checkpoint(1))

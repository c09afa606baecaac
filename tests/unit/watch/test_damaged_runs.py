"""Run directories with values of unexpected types: no command ends with a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.errors import FailureCode, LauncherError
from launcher.lr_report.run_curves import run_curves
from launcher.manifest import MANIFEST, write_manifest
from launcher.plan_file import read_plan
from launcher.runs.checkpoints import checkpoints_json, checkpoints_view, list_checkpoints
from launcher.watch.status import read_status
from launcher.watch.status_report import one_line, runs_view, status_json, status_view
from launcher.watch.why import explain, why_view
from tests.unit.inputs import command, plan_of
from tests.unit.run_directories import START, Built, rank

VALUES: tuple[Any, ...] = (None, "\ud800", [1], {"a": 1}, 10**400)
KILLED = {"rank": 1, "node_rank": 0, "host": "h0", "how": "signal SIGKILL", "exit_code": -9, "code": "rank_killed"}
GPU = {"utilization_percent": 5.0, "memory_used_bytes": 1, "memory_bytes": 2}


@pytest.fixture
def built(tmp_path: Path) -> Built:
    made = Built(tmp_path / "runs")
    made.run.plan_file.write_text(plan_of().to_json())
    made.nodes(["h0"])
    made.event(2.0, "warmup_extended", update=1, warmup_updates=4, peak_lr=1e-5)
    made.node_json(0, "h0", 50.0, [rank(0), rank(1, exit_code=-9)], gpus=[GPU], oom_kills=0, memory_peak_bytes=1)
    made.metrics(range(2))
    made.failure(55.0, KILLED, {**KILLED, "rank": 0, "exit_code": 1, "error": "RuntimeError: x", "traceback": "x"})
    made.state("failed", 56.0, reason="rank 1", message="rank 1", code="rank_killed")
    return made


def damaged(value: Any) -> Iterator[Any]:
    """Copies of the value, each with one of its parts (at any depth) removed or replaced by one of VALUES."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items):
        if isinstance(value, dict):
            yield {name: each for name, each in value.items() if name != key}
        for other in (*VALUES, *damaged(part)):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = other
            yield copy


@pytest.mark.parametrize("name", ["state.json", "logs/node-0-h0/node.json", "events.jsonl", "metrics.jsonl"])
def test_values_of_another_type_are_ignored(built: Built, name: str) -> None:
    file = built.run.path / name
    lines = file.read_text().splitlines() if name.endswith("l") else [file.read_text()]
    console = Console(file=io.StringIO(), width=200)
    for number, line in enumerate(lines):
        for wrong in damaged(json.loads(line)):
            file.write_text("\n".join((*lines[:number], json.dumps(wrong), *lines[number + 1 :], "")))
            try:
                status = read_status(built.run, START + 60.0)
                status_json(status)
                console.print(status_view(status), runs_view([status]), one_line(status), why_view(explain(built.run)))
                if name.endswith("l"):
                    run_curves(built.run)
            except Exception as error:
                raise AssertionError(f"line {number}: {wrong}") from error


def test_valid_values_are_shown_despite_damaged_ones(built: Built) -> None:
    record = json.loads(built.run.node_file(0, "h0").read_text())
    record |= {"cpu_percent": "3", "memory_used_bytes": [], "ranks": ["x", {"rank": None}, rank(1, updates="9")]}
    built.run.node_file(0, "h0").write_text(json.dumps(record))
    [node] = read_status(built.run, START + 60.0).nodes
    assert (node.ranks, node.updates, node.cpu_percent, node.memory_used_bytes) == ((1,), None, None, None)
    assert (node.cpus, node.gpu_percent) == (8, 5.0)


def test_a_written_code_takes_precedence_over_the_message(built: Built) -> None:
    """Messages determine the code only in runs without codes."""
    built.failure(57.0, {**KILLED, "how": "the node's agent is gone", "code": "unknown", "exit_code": 1})
    found = explain(built.run).failures
    assert found is not None and found.first.code is FailureCode.UNKNOWN


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"[" * 100_000, b"\0" * 100, b"[]", b'{"plan": {}}'])
@pytest.mark.parametrize("name", ["plan.json", "plan.revision-1.json"])
def test_a_damaged_plan_is_reported_with_its_file(built: Built, name: str, content: bytes) -> None:
    file = built.run.path / name
    file.write_bytes(content)
    with pytest.raises(LauncherError, match=rf"/{name} is damaged") as caught:
        read_plan(file)
    assert caught.value.code is FailureCode.PLAN_DAMAGED
    ended = command("lr", str(built.run.path))
    assert ended.status == 1 and f"/{name} is damaged" in ended.err
    if name == "plan.json":
        for verb in ("resume", "export"):
            ended = command(verb, str(built.run.path))
            assert ended.status == 1 and f"/{name} is damaged" in ended.err


@pytest.mark.parametrize("name", ["plan.json", "events.jsonl", "metrics.jsonl", "state.json", "logs"])
def test_a_folder_in_place_of_a_file_gives_a_message(built: Built, name: str) -> None:
    path = built.run.path / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink()
        path.mkdir()
    for verb in ("status", "why", "lr", "logs", "resume", "export"):
        ended = command(verb, str(built.run.path))
        assert ended.status in (0, 1, 2) and len(ended.err.splitlines()) <= 3, ended.err
        assert ended.out or ended.err


def test_a_damaged_manifest_is_a_damaged_checkpoint(built: Built) -> None:
    folder = built.run.checkpoint(2)
    folder.mkdir(parents=True)
    (folder / "states").write_bytes(b"states")
    write_manifest(folder, update=2, samples=16, world_size=2, plan_sha256=plan_of().sha256)
    file = folder / MANIFEST
    manifest = json.loads(file.read_text())
    for wrong in [*damaged(manifest), {**manifest, "files": {"a\x1b[2J\ud800": manifest["files"]["states"]}}]:
        file.write_text(json.dumps(wrong))
        (found,) = list_checkpoints(built.run, lambda _: None)
        assert found.state in ("verified", "damaged", "complete")
        view = io.StringIO()
        Console(file=view, width=200).print(checkpoints_view([found]))
        assert "\x1b" not in view.getvalue() and view.getvalue().encode()
        checkpoints_json([found]).encode()


def test_an_unlisted_file_may_have_any_name(built: Built) -> None:
    folder = built.run.checkpoint(2)
    folder.mkdir(parents=True)
    write_manifest(folder, update=2, samples=16, world_size=2, plan_sha256=plan_of().sha256)
    os.close(os.open(os.fsencode(folder) + b"/\xff\x1b[2J", os.O_CREAT))
    ended = command("checkpoints", str(built.run.path), "--verify")
    assert (ended.status, ended.err) == (1, "")
    assert "update-2: '\\udcff\\x1b[2J' is not listed in manifest.json" in ended.out

"""Run directories with random content in their files: every command that reads them prints it or names the fault."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from launcher.lr_report.plan_report import run_report
from launcher.lr_report.report import report_json
from launcher.manifest import MANIFEST, checkpoint_fault, content_fault, write_manifest
from launcher.run_dir import RunDir
from launcher.runs.checkpoints import checkpoints_json, checkpoints_view, list_checkpoints, newest_verified
from launcher.runs.console import RunConsole
from launcher.runs.excluded_nodes import count_failures, exclude_node
from launcher.runs.rest import job_of_rest, rest_of
from launcher.runs.summary import note_damaged_lines
from launcher.watch.log_files import LogSelection
from launcher.watch.print_logs import print_logs
from launcher.watch.status import read_status, read_status_for_list
from launcher.watch.status_report import one_line, runs_view, status_json, status_view
from launcher.watch.why import explain, why_view
from tests.unit.fuzz.cases import NUMBERS, cases, check, mutated, mutated_bytes
from tests.unit.inputs import in_format_1, plan_of
from tests.unit.run_directories import START, Built, rank

GPU = {"utilization_percent": 5.0, "memory_used_bytes": 1, "memory_bytes": 2}
NAMES = ("../states", "/etc/passwd", "..", ".", "", "a/../b", "./states", "states/", "a" * 300, "\x00", "\ud800")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return built_run(tmp_path_factory.mktemp("fuzz"))


def built_run(folder: Path) -> RunDir:
    """A failed run with two checkpoints and lines in every file."""
    built = Built(folder)
    built.run.plan_file.write_text(plan_of().to_json())
    built.nodes(["h0", "h1"])
    built.event(2.0, "warmup_extended", update=1, warmup_updates=4, peak_lr=1e-5)
    built.node_json(
        0, "h0", 50.0, [rank(0, phase="saving"), rank(1, exit_code=-9)], gpus=[GPU], oom_kills=0, memory_peak_bytes=1
    )
    built.node_json(1, "h1", 50.0, [rank(2), rank(3)])
    built.log(0, "h0", "rank-0", (10.0, "line"), "no time", (11.0, "RuntimeError: x"), torn="torn")
    built.metrics(range(4))
    built.run.evaluations_file.write_text('{"update": 2, "loss": 2.0, "tokens": 10}\n')
    failed = {"rank": 1, "node_rank": 0, "host": "h0", "how": "signal SIGKILL", "exit_code": -9, "code": "rank_killed"}
    built.failure(55.0, failed, {**failed, "rank": 0, "exit_code": 1, "error": "RuntimeError: x", "traceback": "x"})
    built.state("failed", 56.0, reason="rank 1", message="rank 1", code="rank_killed")
    built.run.path.joinpath("stop.json").write_text('{"time": "2026-03-01T12:00:00.000Z", "now": false}')
    built.run.lock_file.write_text('{"host": "h0", "pid": 1, "time": "2026-03-01T12:00:00.000Z"}')
    for update in (2, 4):
        checkpoint = built.run.checkpoint(update)
        checkpoint.mkdir(parents=True)
        (checkpoint / "states").write_bytes(b"states")
        (checkpoint / "more").write_bytes(b"")
        write_manifest(checkpoint, update=update, samples=8 * update, world_size=2, plan_sha256=plan_of().sha256)
    count_failures(built.run, {"h0": "signal SIGKILL"}, 2)
    exclude_node(built.run, "h1", "torch sees 3 of the 4 assigned GPUs")
    return built.run


def watch(run: RunDir) -> None:
    output = io.StringIO()
    console = Console(file=output, width=120)
    status = read_status(run, START + 60.0)
    status_json([status, read_status_for_list(run, START + 60.0)])
    console.print(status_view(status), runs_view([status]), one_line(status), why_view(explain(run)))
    output.getvalue().encode()
    assert "\x1b" not in output.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        print_logs(run, LogSelection(None, None), lambda _: True, None, 10)
    lines.getvalue().encode()


def curves(run: RunDir) -> None:
    report_json(run_report(run.path, ())).encode()


def plan_rest(run: RunDir) -> None:
    console = RunConsole(Console(file=io.StringIO()))
    note_damaged_lines(run, console)
    rest_of(run, (), console)
    job_of_rest(run, ("train.max_steps=50",))


def checkpoints(run: RunDir) -> None:
    for note in (None, lambda _: None):
        found = list_checkpoints(run, note)
        Console(file=io.StringIO(), width=120).print(checkpoints_view(found))
        checkpoints_json(found).encode()
    for update in (2, 4):
        checkpoint_fault(run.checkpoint(update)), content_fault(run.checkpoint(update))
    newest_verified(run, lambda _: None)


FILES: dict[str, tuple[Callable[[RunDir], None], ...]] = {
    "state.json": (watch,),
    "logs/node-0-h0/node.json": (watch,),
    "logs/node-0-h0/rank-0.log": (watch,),
    "node_failures.json": (watch, lambda run: count_failures(run, {"h1": "signal SIGKILL"}, 2)),
    "events.jsonl": (watch, curves, plan_rest),
    "metrics.jsonl": (watch, curves, plan_rest),
    "evaluations.jsonl": (watch, plan_rest),
    "stop.json": (watch, plan_rest),
    "launcher.lock": (watch, checkpoints),
}


def random_content(rng: Random, original: bytes, *, lines: bool) -> bytes:
    """Random bytes in a file, or random values in it; `lines`: in one of its lines."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, original)
    parts = original.split(b"\n")[:-1] if lines else [original]
    number = rng.randrange(len(parts))
    with contextlib.suppress(ValueError):
        parts[number] = json.dumps(mutated(rng, json.loads(parts[number]))).encode()
    return b"\n".join(parts) + b"\n"


def with_content(file: Path, content: bytes, shown: Any, *calls: Callable[[], object]) -> None:
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        for call in calls:
            check((file.name, shown), call)
    finally:
        file.write_bytes(original)


def test_the_unchanged_run_is_readable(run: RunDir) -> None:
    for call in (watch, curves, plan_rest, checkpoints):
        assert not check(call.__name__, lambda call=call: call(run))


def test_files_of_a_run(run: RunDir) -> None:
    for rng in cases("run files", 1000):
        name = rng.choice(list(FILES))
        file = run.path / name
        content = random_content(rng, file.read_bytes(), lines=name.endswith("l"))
        with_content(file, content, content, *(lambda call=call: call(run) for call in FILES[name]))


def test_plans(run: RunDir) -> None:
    for rng in cases("plans", 300):
        plan = run.plan_file.read_bytes() if rng.random() < 0.7 else json.dumps(in_format_1(plan_of())).encode()
        content = random_content(rng, plan, lines=False)
        calls = (watch, curves, plan_rest, checkpoints)
        with_content(run.plan_file, content, content[:200], *(lambda call=call: call(run) for call in calls))


def test_manifests(run: RunDir) -> None:
    file = run.checkpoint(4) / MANIFEST
    for rng in cases("manifests", 400):
        content = random_content(rng, file.read_bytes(), lines=False)
        if rng.random() < 0.3:
            manifest = json.loads(file.read_text())
            manifest["files"][rng.choice(NAMES)] = rng.choice(({"size": 6, "sha256": "0" * 64}, rng.choice(NUMBERS)))
            content = json.dumps(manifest).encode()
        calls = (checkpoints, plan_rest)
        with_content(file, content, content, *(lambda call=call: call(run) for call in calls))

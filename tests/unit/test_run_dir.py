"""The run directory: files are replaced atomically, and growing files are read by complete lines."""

from __future__ import annotations

import errno
import fcntl
import json
import stat
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from launcher.errors import FailureCode, RunFailed
from launcher.run_dir import (
    MANIFEST,
    RunDir,
    append_line,
    checkpoint_is_complete,
    read_lines,
    read_manifest,
    utc_now,
    write_atomic,
    write_json,
    write_manifest,
)
from tests.time_limit import TIME_LIMIT_SECONDS


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "tiny")


def saved(run: RunDir, update: int, **files: str) -> Path:
    folder = run.checkpoint(update)
    (folder / "states").mkdir(parents=True)
    for name, content in (files or {"model": "abc", "optimizer": "defg"}).items():
        (folder / "states" / name).write_text(content)
    write_manifest(folder, update=update, samples=8 * update)
    return folder


def test_every_caller_gets_another_directory(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(RunDir.create(tmp_path, "tiny").path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert all(path.name.startswith("tiny-") and (path / "logs").is_dir() for path in found)
    assert all(path.is_absolute() and (path / "checkpoints").is_dir() for path in found)


def test_a_reader_sees_the_old_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    texts = {"a" * 200_000, "b" * 100_000}
    write_atomic(path, "a" * 200_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in texts:
                write_atomic(path, text)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_text() for _ in range(300)}
    stop.set()
    writer.join()
    assert seen <= texts
    assert [child.name for child in tmp_path.iterdir()] == ["state.json"]


def test_a_failed_write_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"state": "training"})
    with pytest.raises(TypeError):
        write_json(path, {"state": object()})
    path.unlink()
    path.mkdir()  # a file cannot replace a folder
    with pytest.raises(OSError):
        write_atomic(path, "x")
    assert [child.name for child in tmp_path.iterdir()] == ["state.json"]


def test_an_unfinished_last_line_is_read_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_lines(path)) == []
    append_line(path, {"update": 0})
    with path.open("a") as file:
        file.write('{"update": 1, "lo')
    assert list(read_lines(path)) == [{"update": 0}]
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    assert list(read_lines(path)) == [{"update": 0}, {"update": 1, "loss": 2.0}]


def test_lines_of_several_writers_stay_intact(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write(number: int) -> None:
        for i in range(50):
            append_line(path, {"writer": number, "i": i, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = list(read_lines(path))
    assert len(lines) == 200
    for number in range(4):
        assert [line["i"] for line in lines if line["writer"] == number] == list(range(50))


def test_states_are_written_to_the_state_file_and_the_events(run: RunDir) -> None:
    assert run.state() == {}
    run.enter("planning")
    run.enter("failed", reason="no room")
    assert (run.state()["state"], run.state()["reason"]) == ("failed", "no room")
    assert [(event["event"], event["state"]) for event in run.events()] == [("state", "planning"), ("state", "failed")]


def test_an_unknown_state_is_refused(run: RunDir) -> None:
    run.enter("training")
    with pytest.raises(ValueError, match="'trianing' is not a state of a run"):
        run.enter("trianing")
    assert run.state()["state"] == "training"


def test_complete_checkpoints_are_in_order_of_updates(run: RunDir) -> None:
    for update in (100, 20, 3):
        saved(run, update)
    assert run.complete_checkpoints() == [3, 20, 100]


@pytest.mark.parametrize("content", ["ab", "abcd", None])
def test_a_file_of_another_size_or_missing_makes_a_checkpoint_incomplete(run: RunDir, content: str | None) -> None:
    saved(run, 10)
    file = saved(run, 20) / "states/model"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert run.complete_checkpoints() == [10]


def test_a_checkpoint_without_a_valid_manifest_is_incomplete(run: RunDir) -> None:
    unfinished, torn = saved(run, 1), saved(run, 2)
    (unfinished / MANIFEST).unlink()
    (torn / MANIFEST).write_text((torn / MANIFEST).read_text()[:-20])
    (run.checkpoints / "update-x").mkdir()
    (run.checkpoints / "latest").write_text("update-2")
    assert read_manifest(torn) is None
    assert run.complete_checkpoints() == []


def test_a_manifest_lists_every_file_except_itself(run: RunDir) -> None:
    folder = saved(run, 5, model="abc", optimizer="")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert {name: entry["size"] for name, entry in files.items()} == {"states/model": 3, "states/optimizer": 0}
    assert checkpoint_is_complete(folder)


@pytest.mark.usefixtures("_east_of_utc")
def test_times_are_utc_and_can_be_parsed() -> None:
    assert utc_now().endswith("Z")
    assert 0 <= time.time() - datetime.fromisoformat(utc_now()).timestamp() < TIME_LIMIT_SECONDS


def test_checkpoints_are_ordered_by_samples(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "x")
    for update, samples in ((900, 7200), (1000, 8000), (600, 9600)):
        run.checkpoint(update).mkdir()
        write_manifest(run.checkpoint(update), update=update, samples=samples)
    assert run.complete_checkpoints() == [900, 1000, 600]


def test_a_rewind_sets_aside_lines_after_a_checkpoint(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "x")
    for update in range(5):
        append_line(run.metrics_file, {"update": update, "samples": 8 * (update + 1)})
    append_line(run.evaluations_file, {"update": 0})
    run.rewind(samples=24, update=3)
    assert [line["update"] for line in run.metrics()] == [0, 1, 2]
    assert len((run.path / "metrics.undone-1.jsonl").read_text().splitlines()) == 5
    assert run.evaluations() == [{"update": 0}]
    run.rewind(samples=24, update=3)
    assert len(list(run.path.glob("*.undone-*"))) == 1


def test_only_one_launcher_holds_a_run_directory(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "x")
    with run.held() as first, run.held() as second:
        assert (first, second) == (True, False)
    with run.held() as again:
        assert again


def test_a_run_directory_is_held_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path, "job")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run.held() as held:
        assert held


def test_a_stop_request_names_the_user_and_can_be_read(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "job", "slurm-7")
    assert run.path.name == "job-slurm-7"
    assert run.stop_request() is None
    run.request_stop(now=True)
    request = run.stop_request()
    assert request is not None and request["now"] is True and "@" in request["by"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"\x00" * 40,
        b'{"update": 2}',
        b'{"update": "2", "samples": 16, "files": {}}',
        b"[" * 99999,
    ],
)
def test_an_unreadable_manifest_is_like_a_missing_one(run: RunDir, content: bytes) -> None:
    saved(run, 1)
    (saved(run, 2) / MANIFEST).write_bytes(content)
    assert read_manifest(run.checkpoint(2)) is None
    assert run.complete_checkpoints() == [1]


def test_a_manifest_of_another_update_is_ignored(run: RunDir) -> None:
    saved(run, 1).rename(run.checkpoint(5))
    saved(run, 2)
    assert run.complete_checkpoints() == [2]


def test_the_next_revision_has_the_highest_number(run: RunDir) -> None:
    assert run.next_plan_revision().name == "plan.revision-1.json"
    for number in (2, 10):
        (run.path / f"plan.revision-{number}.json").touch()
    assert run.next_plan_revision().name == "plan.revision-11.json"


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"state": "trai', b"\xff\xfe", b"\x00" * 99])
def test_an_unreadable_state_is_like_a_missing_one(run: RunDir, content: bytes) -> None:
    run.state_file.write_bytes(content)
    run.stop_file.write_bytes(content)
    assert run.state() == {}
    assert run.stop_request() is None


def test_damaged_lines_are_skipped_and_counted_per_file(run: RunDir) -> None:
    assert run.damaged_lines() == {}
    for file, record in (
        (run.metrics_file, {"update": 0, "samples": 8}),
        (run.evaluations_file, {"update": 0, "loss": 1.0}),
        (run.events_file, {"event": "state", "state": "placing"}),
    ):
        append_line(file, record)
        with file.open("ab") as torn:
            torn.write(b'{"update": 1, "lo')
        append_line(file, record)
    append_line(run.metrics_file, {"update": "one"})
    assert run.damaged_lines() == {"metrics.jsonl": 2, "evaluations.jsonl": 1, "events.jsonl": 1}
    assert [len(found) for found in (run.metrics(), run.evaluations(), run.events())] == [2, 2, 2]


def test_a_rewind_uses_the_update_of_lines_without_samples(run: RunDir) -> None:
    for update in range(3):
        append_line(run.metrics_file, {"update": update, "loss": "nan"})
    append_line(run.metrics_file, {"loss": 1.0})
    run.rewind(samples=16, update=2)
    assert [line["update"] for line in run.metrics()] == [0, 1]
    run.rewind(samples=0, update=-1)
    assert run.metrics_file.read_bytes() == b""
    assert {path.name for path in run.path.glob("*.undone-*")} == {f"metrics.undone-{k}.jsonl" for k in (1, 2)}


def test_only_the_owner_can_read_a_run_directory(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "x")
    for folder in (run.path, run.checkpoints, run.logs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_attempts_are_counted_and_an_earlier_one_must_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path, "run")
    assert run.attempt() == 0
    assert [run.begin_attempt(), run.begin_attempt()] == [1, 2]
    monkeypatch.setenv("LAUNCHER_ATTEMPT", "2")
    run.check_attempt()
    monkeypatch.setenv("LAUNCHER_ATTEMPT", "1")
    with pytest.raises(RunFailed, match="attempt 1 of the run was given up, and attempt 2 has started"):
        run.check_attempt()
    run.attempt_file.write_text("damaged")
    run.check_attempt()
    assert run.attempt() == 0


def test_an_attempt_that_is_given_up_must_not_write_even_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path, "run")
    run.rewind(samples=0, update=-1)
    assert not run.attempt_file.exists()
    monkeypatch.setenv("LAUNCHER_ATTEMPT", str(run.begin_attempt()))
    run.check_attempt()
    run.rewind(samples=0, update=-1)
    with pytest.raises(RunFailed, match="attempt 1 of the run was given up: writing nothing"):
        run.check_attempt()
    monkeypatch.setenv("LAUNCHER_ATTEMPT", str(run.begin_attempt()))
    run.check_attempt()
    assert run.attempt() == 2


def test_a_rank_whose_run_directory_was_removed_must_not_create_it_again(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    run.path.rename(tmp_path / "removed")
    with pytest.raises(RunFailed, match=f"the run directory {run.path} was removed during the run") as caught:
        run.check_attempt()
    assert caught.value.code is FailureCode.MISSING_FILE


def test_an_attempt_reserves_space_for_the_reason_of_its_failure(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    run.release_reserve()
    run.begin_attempt()
    assert run.reserve_file.stat().st_size == 64 * 1024
    run.release_reserve()
    assert not run.reserve_file.exists()

"""Uploading a run to a folder as if it were cloud storage, and downloading it again (several modules)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RequestError, RunFailed
from launcher.job.kept_checkpoints import removable
from launcher.manifest import MANIFEST, read_manifest, write_manifest
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.runs import resume, upload
from launcher.runs.checkpoints import newest_verified
from launcher.runs.console import RunConsole
from launcher.runs.fetch import fetch_run
from launcher.runs.interrupts import Interrupted, interruptible
from launcher.runs.remote import Store, StoreError
from launcher.runs.remote_run import Copy, due, remote_checkpoints, remote_name, superfluous
from launcher.runs.resume import resume_locked
from launcher.runs.upload import upload_run, uploading
from launcher.runs.uploader import Pauses, Uploader
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import command, data_facts, job_of, plan_of
from tests.unit.runs.test_checkpoints import flip_bit, save

QUICK = Pauses(look=0.01, first=0.01, longest=0.02)
FILES = ("model_states.pt", "optim_states.pt")


@dataclass
class Watched(Store):
    """A store that lists what is written, and calls `before` with the name of each object before it is written."""

    url: str
    before: Callable[[str], None] = lambda _: None
    written: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.url)

    def put(self, file: Path, name: str, *arguments: Any) -> None:
        self.before(name)
        super().put(file, name, *arguments)
        self.written.append(name)

    def write(self, name: str, content: bytes) -> None:
        self.before(name)
        super().write(name, content)
        self.written.append(name)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket/runs"


@pytest.fixture
def plan(url: str) -> Plan:
    return plan_of(job_of(checkpoint={"upload": url}))


@pytest.fixture
def run(tmp_path: Path, plan: Plan) -> RunDir:
    run = RunDir.create(tmp_path / "here", "tiny", "1")
    run.plan_file.write_text(plan.to_json())
    run.job_file.write_text("name: tiny\n")
    run.metrics_file.write_text('{"update":0,"samples":8}\n')
    return run


def uploader(store: Store, plan: Plan, run: RunDir, notes: list[str] | None = None, **more: Any) -> Uploader:
    note = print if notes is None else notes.append
    return Uploader(store, plan, run, note, pauses=QUICK, **more)


def complete(url: str, run: RunDir) -> dict[str, int]:
    return {each.folder: each.update for each in remote_checkpoints(Store(url), run.path.name).complete}


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def bucket_folder(url: str) -> Path:
    return Path(url.removeprefix("file://")).parent


def bucket(url: str, run: RunDir) -> Path:
    return Path(url.removeprefix("file://")) / run.path.name


def test_the_plan_and_the_metrics_come_first_and_the_manifest_last(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    store = Watched(url)
    uploader(store, plan, run).upload_all()
    names = [name.removeprefix(f"{run.path.name}/") for name in store.written]
    first, last = names.index("checkpoints/update-4/model_states.pt"), names.index(f"checkpoints/update-4/{MANIFEST}")
    assert {"plan.json", "metrics.jsonl", "job.yaml"} <= set(names[:first])
    assert set(names[first:last]) == {f"checkpoints/update-4/{name}" for name in FILES}
    (event,) = events(run, "uploaded")
    assert event["what"] == "update-4" and event["bytes"] == sum(
        (run.checkpoint(4) / name).stat().st_size for name in FILES
    )


def test_an_interrupted_upload_is_never_complete_and_continues_with_the_missing_files(
    url: str, plan: Plan, run: RunDir
) -> None:
    save(run, plan, 4)

    def fail(name: str) -> None:
        if name.endswith(FILES[1]):
            raise StoreError("connection lost")

    with pytest.raises(StoreError):
        uploader(Watched(url, fail), plan, run).upload_all()
    assert complete(url, run) == {}
    assert (bucket(url, run) / "checkpoints/update-4" / FILES[0]).is_file()
    with pytest.raises(RequestError, match="no complete checkpoint found"):
        fetch_run(f"{url}/{run.path.name}", run.path.parent / "copy", print)
    again = Watched(url)
    uploader(again, plan, run).upload_all()
    assert complete(url, run) == {"update-4": 4}
    written = [Path(name).name for name in again.written if "checkpoints/" in name]
    assert written == [FILES[1], MANIFEST]


def test_a_file_of_the_right_size_with_other_content_is_uploaded_again(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    uploader(Store(url), plan, run).upload_all()
    folder = bucket(url, run) / "checkpoints/update-4"
    flip_bit(folder / FILES[0])
    (folder / "left-over.1234.part").write_text("x")
    (folder / MANIFEST).unlink()
    uploader(Store(url), plan, run).upload_all()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in run.checkpoint(4).iterdir()
    }


@pytest.mark.parametrize("moment", [*FILES, MANIFEST])
def test_a_checkpoint_that_is_pruned_meanwhile_is_given_up(url: str, plan: Plan, run: RunDir, moment: str) -> None:
    save(run, plan, 4)
    save(run, plan, 8)

    def prune(name: str) -> None:
        if name.endswith(f"update-8/{moment}"):
            shutil.rmtree(run.checkpoint(8))

    uploader(Watched(url, prune), plan, run).upload_all()
    if moment == MANIFEST:
        # All its files are there already: it is as good as before.
        assert complete(url, run) == {"update-4": 4, "update-8": 8}
        return
    assert complete(url, run) == {"update-4": 4}
    assert not (bucket(url, run) / "checkpoints/update-8").exists()
    (event,) = events(run, "upload_given_up")
    assert event["checkpoint"] == "update-8" and "removed" in event["reason"]


def test_a_damaged_checkpoint_is_not_uploaded(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    save(run, plan, 8)
    flip_bit(run.checkpoint(8) / FILES[0])
    notes: list[str] = []
    uploader(Store(url), plan, run, notes).upload_all()
    assert complete(url, run) == {"update-4": 4}
    (event,) = events(run, "upload_given_up")
    assert "its checksum differs" in event["reason"]
    assert any("update-8" in note and "its checksum differs" in note for note in notes)


def test_an_unreachable_bucket_is_reported_once_and_tried_until_it_works(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    bucket_folder(url).write_text("a file where a folder must be")
    failed = threading.Event()
    attempts: list[str] = []

    def count(name: str) -> None:
        attempts.append(name)
        if len(attempts) >= 5:
            failed.set()

    notes: list[str] = []
    background = uploader(Watched(url, count), plan, run, notes)
    background.begin()
    assert failed.wait(TIME_LIMIT_SECONDS)
    assert len(notes) == 1 and "failed, and is repeated" in notes[0]
    (event,) = events(run, "upload_failed")
    assert event["url"] == url and str(bucket_folder(url)) in event["reason"]
    bucket_folder(url).unlink()
    background.end(TIME_LIMIT_SECONDS)
    assert complete(url, run) == {"update-4": 4}
    assert len(events(run, "upload_failed")) == 1
    assert notes[-1].split() == ["uploaded", "to", f"{url}/{run.path.name}"]


def test_what_is_not_uploaded_in_time_is_reported_with_the_way_to_do_it(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    bucket_folder(url).write_text("a file where a folder must be")
    notes: list[str] = []
    background = uploader(Store(url), plan, run, notes)
    background.begin()
    background.end(0.1)
    assert "not uploaded" in notes[-2] and "update-4" in notes[-2]
    assert f"launcher upload {run.path}" in notes[-1]
    ended = command("upload", str(run.path))
    assert ended.status == 2 and "checkpoint.upload: cannot write to file://" in ended.err
    bucket_folder(url).unlink()
    ended = command("upload", str(run.path))
    assert ended.status == 0 and f"uploaded to {url}" in ended.out
    assert complete(url, run) == {"update-4": 4}


RULES = [
    {"keep": 1},
    {"keep": 2, "keep_every": 6},
    {"keep": 1, "keep_best": 2},
    {"keep": 2, "keep_every": 8, "keep_best": 1},
]


@pytest.mark.parametrize("rule", RULES)
def test_the_same_checkpoints_are_kept_as_in_the_run_directory(url: str, run: RunDir, rule: dict[str, int]) -> None:
    """One more checkpoint at a time, as a run saves them; the last rule of pruning is the run's own."""
    job = job_of(checkpoint={"upload": url, **rule}, data={"eval": 0.1})
    plan = plan_of(job, data=data_facts(evaluated=100))
    losses = {2: 2.0, 4: 1.0, 6: 3.0, 8: 1.5, 10: 2.5}
    worker = uploader(Store(url), plan, run)
    for update, loss in losses.items():
        save(run, plan, update)
        folder = run.checkpoint(update)
        facts = {key: (read_manifest(folder) or {})[key] for key in ("world_size", "update", "samples", "plan_sha256")}
        write_manifest(folder, **facts, evaluation_loss=loss)
        worker.upload_all()
        # Without this one, what the rule keeps here is also what it keeps there.
        here = {each: losses[each] for each in run.usable_checkpoints()}
        for gone in removable(here, plan.job.checkpoint):
            shutil.rmtree(run.checkpoint(gone))
        assert sorted(complete(url, run).values()) == sorted(run.usable_checkpoints())


def test_a_checkpoint_that_is_saved_again_replaces_the_other_only_when_it_is_complete(
    url: str, plan: Plan, run: RunDir
) -> None:
    save(run, plan, 8)
    uploader(Store(url), plan, run).upload_all()
    before = (run.checkpoint(8) / MANIFEST).read_bytes()
    shutil.rmtree(run.checkpoint(8))
    save(run, plan, 8)
    assert (run.checkpoint(8) / MANIFEST).read_bytes() != before

    def still_there(name: str) -> None:
        if "checkpoints/" in name:
            assert "update-8" in complete(url, run)

    uploader(Watched(url, still_there), plan, run).upload_all()
    (found,) = remote_checkpoints(Store(url), run.path.name).complete
    assert found.folder.startswith("update-8.") and found.update == 8
    fetched = fetch_run(f"{url}/{run.path.name}", run.path.parent / "copy", print)
    assert (fetched.checkpoint(8) / MANIFEST).read_bytes() == (run.checkpoint(8) / MANIFEST).read_bytes()


def test_updates_that_a_resume_makes_again_do_not_count(url: str, plan: Plan, run: RunDir) -> None:
    """The newest one in the bucket belongs to a past that the run has left."""
    for update in (4, 8):
        save(run, plan, update)
        uploader(Store(url), plan, run).upload_all()
    shutil.rmtree(run.checkpoint(8))
    start = Start(checkpoint=str(run.checkpoint(4)), update=4, samples=4 * plan.train_batch_size)
    save(run, plan, 6)
    uploader(Store(url), plan, run, start=start).upload_all()
    assert complete(url, run) == {"update-4": 4, "update-6": 6}


@pytest.mark.parametrize(("kept", "saved"), [(4, 6), (0, 2)])
def test_updates_that_a_restart_makes_again_do_not_count(
    url: str, plan: Plan, run: RunDir, kept: int, saved: int
) -> None:
    """The newest one here was damaged, so the run restarted from the one before it, or from scratch."""
    worker = uploader(Store(url), plan, run)
    for update in (4, 8):
        save(run, plan, update)
        worker.upload_all()
    for update in (4, 8):
        if update > kept:
            shutil.rmtree(run.checkpoint(update))
    worker.rewound(kept * plan.train_batch_size)
    save(run, plan, saved)
    worker.upload_all()
    assert sorted(complete(url, run).values()) == [update for update in (kept, saved) if update]


def test_a_milestone_that_the_user_removes_here_stays_there(url: str, run: RunDir) -> None:
    """Also one that was saved after a resume."""
    plan = plan_of(job_of(checkpoint={"upload": url, "keep": 1, "keep_every": 8}))
    save(run, plan, 4)
    worker = uploader(Store(url), plan, run, start=Start(checkpoint="", update=4, samples=4 * plan.train_batch_size))
    for update in (8, 10):
        save(run, plan, update)
        worker.upload_all()
    shutil.rmtree(run.checkpoint(8))
    save(run, plan, 12)
    worker.upload_all()
    assert complete(url, run) == {"update-8": 8, "update-12": 12}


def test_a_resume_checks_the_bucket_before_it_starts(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    bucket_folder(url).write_text("a file where a folder must be")
    ended = command("resume", str(run.path))
    assert ended.status == 2 and "checkpoint.upload: cannot write to file://" in ended.err
    assert run.state() == {}


def test_a_requeued_run_resumes_while_the_bucket_cannot_be_reached(
    url: str, plan: Plan, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may be there to repair it, and what is saved is uploaded later."""
    started: list[Start | None] = []
    monkeypatch.setattr(resume, "carry_out", lambda *given: started.append(given[4]))
    save(run, plan, 4)
    bucket_folder(url).write_text("a file where a folder must be")
    resume_locked(run, [], RunConsole(), requeued=True)
    assert [start and start.update for start in started] == [4]
    with pytest.raises(RequestError, match="cannot write to"):
        resume_locked(run, [], RunConsole())


def test_the_export_is_uploaded_once_it_is_complete_and_again_when_it_changes(
    url: str, plan: Plan, run: RunDir
) -> None:
    worker = uploader(Store(url), plan, run)
    header = json.dumps({"w": {"data_offsets": [0, 4]}}).encode()
    weights = len(header).to_bytes(8, "little") + header
    run.export.mkdir()
    (run.export / "config.json").write_text("{}")
    (run.export / "model.safetensors").write_bytes(weights + b"123")
    worker.upload_all()
    there = bucket(url, run) / "export"
    assert not there.exists()
    for content in (b"1234", b"5678"):
        (run.export / "model.safetensors").write_bytes(weights + content)
        worker.upload_all()
        assert (there / "model.safetensors").read_bytes() == weights + content
        assert set(json.loads((there / MANIFEST).read_text())["files"]) == {"config.json", "model.safetensors"}
    store = Watched(url)
    uploader(store, plan, run).upload_all()
    assert not any("/export/" in name for name in store.written)
    assert [event["what"] for event in events(run, "uploaded")] == ["export", "export"]


def test_a_downloaded_run_is_the_uploaded_one(url: str, plan: Plan, run: RunDir, tmp_path: Path) -> None:
    save(run, plan, 4)
    save(run, plan, 8)
    uploader(Store(url), plan, run).upload_all()
    ended = command("resume", f"{url}/{run.path.name}", "--to", str(tmp_path / "copy"), "--download-only")
    assert ended.status == 0 and "downloading update-8" in ended.out
    fetched = RunDir(tmp_path / "copy" / run.path.name)
    saved, damaged = newest_verified(fetched, print)
    assert (saved.update, saved.plan, damaged) == (8, plan, [])
    assert fetched.complete_checkpoints() == [8]
    assert fetched.metrics() == run.metrics() and fetched.job_file.read_text() == run.job_file.read_text()
    assert fetched.path.stat().st_mode & 0o077 == 0
    again = command("resume", f"{url}/{run.path.name}", "--to", str(tmp_path / "copy"))
    assert again.status == 2 and "exists already" in again.err and f"launcher resume {fetched.path}" in again.err


@pytest.mark.parametrize(("mode", "folders", "files"), [("private", 0o700, 0o600), ("group", 0o750, 0o640)])
def test_a_copy_and_its_download_have_the_modes_of_the_job(
    url: str, run: RunDir, tmp_path: Path, mode: str, folders: int, files: int
) -> None:
    plan = plan_of(job_of(checkpoint={"upload": url}, output_mode=mode))
    run.plan_file.write_text(plan.to_json())
    save(run, plan, 4)
    before = os.umask(0)
    try:
        upload_run(run, plan, None, print)
        fetched = fetch_run(f"{url}/{run.path.name}", tmp_path / "copy", print)
    finally:
        os.umask(before)
    found = [bucket(url, run), *bucket(url, run).rglob("*"), fetched.path, *fetched.path.rglob("*")]
    wrong = {
        str(path): oct(path.stat().st_mode)
        for path in found
        if stat.S_IMODE(path.stat().st_mode) != (folders if path.is_dir() else files)
    }
    assert len(found) > 15 and wrong == {}


def test_a_damaged_download_is_not_used(url: str, plan: Plan, run: RunDir, tmp_path: Path) -> None:
    save(run, plan, 4)
    save(run, plan, 8)
    uploader(Store(url), plan, run).upload_all()
    flip_bit(bucket(url, run) / "checkpoints/update-8" / FILES[0])
    notes: list[str] = []
    fetched = fetch_run(f"{url}/{run.path.name}", tmp_path / "copy", notes.append)
    assert fetched.complete_checkpoints() == [4]
    assert any("update-8 cannot be used" in note and "checksum" in note for note in notes)


def test_a_manifest_cannot_name_files_outside_of_the_checkpoint(
    url: str, plan: Plan, run: RunDir, tmp_path: Path
) -> None:
    save(run, plan, 4)
    uploader(Store(url), plan, run).upload_all()
    manifest = bucket(url, run) / "checkpoints/update-4" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["../../../../stolen"] = content["files"][FILES[0]]
    manifest.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="no complete checkpoint found"):
        fetch_run(f"{url}/{run.path.name}", tmp_path / "copy", print)
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_url_without_a_run_is_refused_with_the_runs_that_are_there(url: str, plan: Plan, run: RunDir) -> None:
    uploader(Store(url), plan, run).upload_all()
    ended = command("resume", f"{url}/other")
    assert ended.status == 2 and "no run was found" in ended.err and run.path.name in ended.err
    ended = command("resume", "s3://user:geheim@bucket/run")
    assert ended.status == 2 and "must not contain a user or a password" in ended.err and "geheim" not in ended.err
    ended = command("submit", "--resume", f"{url}/{run.path.name}", "--to", "slurm")
    assert ended.status == 2 and "--download-only" in ended.err


def test_a_checkpoint_of_a_later_version_is_left_alone(url: str, plan: Plan, run: RunDir) -> None:
    save(run, plan, 4)
    uploader(Store(url), plan, run).upload_all()
    later = bucket(url, run) / "checkpoints/update-2" / MANIFEST
    later.parent.mkdir()
    later.write_text(json.dumps({**(read_manifest(run.checkpoint(4)) or {}), "format": 99}))
    uploader(Store(url), plan, run).upload_all()
    assert later.is_file() and complete(url, run) == {"update-4": 4}
    listed = json.loads(command("checkpoints", f"{url}/{run.path.name}", "--json").out)
    assert [(each["name"], each["state"]) for each in listed] == [("update-4", "complete"), ("update-2", "incomplete")]


class Noting(RunConsole):
    """A console that lists its notes, and calls `on_note` with each."""

    def __init__(self, on_note: Callable[[str], None] = lambda _: None) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.on_note = on_note

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.on_note(text)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "Uploader", partial(Uploader, pauses=QUICK))


@pytest.mark.usefixtures("_quick")
def test_what_a_failed_run_has_saved_is_uploaded(url: str, plan: Plan, run: RunDir) -> None:
    console = Noting()

    def fail() -> None:
        with interruptible(console, run) as interrupts, uploading(plan, run, console, interrupts):
            save(run, plan, 4)
            raise RunFailed("a rank failed")

    with pytest.raises(RunFailed, match="a rank failed"):
        fail()
    assert complete(url, run) == {"update-4": 4}
    assert console.notes[-1].split() == ["uploaded", "to", f"{url}/{run.path.name}"]


@pytest.mark.usefixtures("_quick")
def test_a_signal_ends_the_waiting_for_the_last_upload(url: str, plan: Plan, run: RunDir) -> None:
    """The run has ended by then: its exit status does not change."""

    def interrupt(text: str) -> None:
        if "waiting up to 600 s" in text:
            os.kill(os.getpid(), signal.SIGINT)

    console = Noting(interrupt)
    bucket_folder(url).write_text("a file where a folder must be")
    save(run, plan, 4)
    with interruptible(console, run) as interrupts, uploading(plan, run, console, interrupts):
        pass
    assert "not uploaded" in console.notes[-2] and "update-4" in console.notes[-2]


@pytest.mark.usefixtures("_quick")
def test_a_run_that_is_stopped_at_once_does_not_wait(url: str, plan: Plan, run: RunDir) -> None:
    console = Noting()
    bucket_folder(url).write_text("a file where a folder must be")
    save(run, plan, 4)
    with (
        pytest.raises(Interrupted),
        interruptible(console, run) as interrupts,
        uploading(plan, run, console, interrupts),
    ):
        raise KeyboardInterrupt
    assert not any("waiting up to" in note for note in console.notes) and "not uploaded" in console.notes[-2]


def copy(update: int, digest: str = "", samples: int | None = None, loss: float | None = None) -> Copy:
    return Copy(f"update-{update}", update, samples or 8 * update, 8, loss, digest or f"d{update}", "", {})


def test_which_are_due_and_which_are_superfluous() -> None:
    section = job_of(checkpoint={"keep": 2}).checkpoint
    local = {4: copy(4), 8: copy(8), 12: copy(12)}
    assert [each.update for each in due(local, [], section)] == [12, 8]
    assert [each.update for each in due(local, [copy(12)], section)] == [8]
    assert superfluous([copy(8), copy(12)], section) == []
    assert [each.update for each in superfluous([copy(4), copy(8), copy(12)], section)] == [4]
    # After a change of the batch size, updates are counted in another way.
    larger = copy(6, samples=200)
    assert [each.update for each in superfluous([copy(8), copy(12), larger], section)] == [8]
    assert [each.digest for each in superfluous([copy(8, "old"), copy(8, "new")], section)] == ["old"]
    assert remote_name(copy(8), [copy(8)]) == "update-8"
    assert remote_name(copy(8, "0123456789"), [copy(8)]) == "update-8.01234567"

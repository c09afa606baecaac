"""Uploading to a real S3 server that is killed or cut off, and real ranks that continue from there."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.errors import RequestError
from launcher.manifest import MANIFEST, read_manifest, write_manifest
from launcher.run_dir import RunDir
from launcher.runs.fetch import fetch_run
from launcher.runs.remote import Store
from launcher.runs.remote_run import remote_checkpoints
from launcher.runs.uploader import Pauses, Uploader
from tests.local.fault_runs import Start, check_results
from tests.local.launcher_commands import Command, run_folder, updates_made, write_job
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.local.s3_server import BUCKET, Proxy, Server, s3_server, use, variables
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import command
from tests.unit.inputs import plan_of as plan_by_hand
from tests.unit.runs.test_checkpoints import save
from tests.unit.runs.test_upload import FILES, Watched

pytestmark = pytest.mark.local

URL = f"s3://{BUCKET}/runs"
LARGE = "weights.pt"
UPDATES = 60


@pytest.fixture
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run with one checkpoint, one of whose files is uploaded in several parts."""
    plan = plan_by_hand()
    run = RunDir.create(tmp_path / "here", "tiny", "1")
    run.plan_file.write_text(plan.to_json())
    save(run, plan, 4)
    folder = run.checkpoint(4)
    shutil.copy(folder / FILES[0], folder / LARGE)
    with (folder / LARGE).open("r+b") as file:
        archive = file.read()
        file.seek(0)
        # A zip archive may have other content before it, if it still starts like one.
        file.write(b"PK" + random.Random(0).randbytes(110 * 2**20) + archive)
    facts = {key: read_manifest(folder)[key] for key in ("world_size", "update", "samples", "plan_sha256")}
    write_manifest(folder, **facts)
    return run


def uploader(store: Store, run: RunDir, notes: list[str]) -> Uploader:
    return Uploader(store, plan_by_hand(), run, notes.append, pauses=Pauses(0.01, 0.01, 0.2))


def complete(run: RunDir) -> list[str]:
    return [each.folder for each in remote_checkpoints(Store(URL), run.path.name).complete]


def assert_downloads(run: RunDir, folder: Path) -> None:
    fetched = fetch_run(f"{URL}/{run.path.name}", folder, print)
    for path in run.checkpoint(4).iterdir():
        assert (fetched.checkpoint(4) / path.name).read_bytes() == path.read_bytes()


def test_the_check_before_the_start_names_what_is_wrong(server, monkeypatch):
    use(monkeypatch, server.port)
    Store(URL).check_writable()
    assert server.names() == []
    with pytest.raises(RequestError, match=r"cannot write to s3://nobody-has-it/a: .*bucket does not exist"):
        Store("s3://nobody-has-it/a").check_writable()
    server.kill()
    with pytest.raises(RequestError, match=r"cannot write to s3://bucket/runs: .*onnect") as caught:
        Store(URL).check_writable()
    assert "secret-of-the-test" not in str(caught.value)


def test_a_server_that_is_killed_in_the_middle(server, run, tmp_path, monkeypatch):
    use(monkeypatch, server.port)
    killed: list[str] = []

    def kill(name: str) -> None:
        if name.endswith(LARGE) and not killed:
            server.kill()
            killed.append(name)

    notes: list[str] = []
    store = Watched(URL, kill)
    background = uploader(store, run, notes)
    background.begin()
    wait_until(lambda: notes)
    server.start()
    background.end(TIME_LIMIT_SECONDS)
    assert ["failed, and is repeated" in note for note in notes].count(True) == 1
    assert len(killed) == 1 and complete(run) == ["update-4"]
    assert_downloads(run, tmp_path / "copy")


def test_connections_that_are_cut_in_the_middle(server, run, tmp_path, monkeypatch):
    """What was complete before is not uploaded again, and no part is left behind."""
    proxy = Proxy(server.port, limit=60 * 2**20)
    use(monkeypatch, proxy.port)
    notes: list[str] = []
    store = Watched(URL)
    background = uploader(store, run, notes)
    background.begin()
    assert proxy.reached.wait(TIME_LIMIT_SECONDS)
    wait_until(lambda: notes)
    assert not any(name.endswith(f"update-4/{MANIFEST}") for name in server.names())
    proxy.limit = None
    background.end(TIME_LIMIT_SECONDS)
    proxy.close()
    assert [name.rpartition("/")[2] for name in store.written if "checkpoints/" in name] == [*FILES, LARGE, MANIFEST]
    use(monkeypatch, server.port)
    assert complete(run) == ["update-4"]
    assert_downloads(run, tmp_path / "copy")


UPLOADING = """
import sys
import time
from pathlib import Path
from launcher.plan_file import read_plan
from launcher.run_dir import RunDir
from launcher.runs.remote import Store
from launcher.runs.uploader import Uploader
run = RunDir(Path(sys.argv[1]))
Uploader(Store(sys.argv[2]), read_plan(run.plan_file), run, print).upload_all()
"""


def test_a_process_that_is_killed_while_it_uploads(server, run, tmp_path, monkeypatch):
    proxy = Proxy(server.port, limit=60 * 2**20, hold=True)
    child = subprocess.Popen(
        [sys.executable, "-c", UPLOADING, str(run.path), URL], env={**os.environ, **variables(proxy.port)}
    )
    assert proxy.reached.wait(TIME_LIMIT_SECONDS)
    child.kill()
    child.wait()
    proxy.close()
    use(monkeypatch, server.port)
    there = {name.rpartition("/")[2] for name in server.names() if "/checkpoints/" in name}
    assert there == set(FILES) and complete(run) == []
    assert len(server.client().list_multipart_uploads(Bucket=BUCKET)["Uploads"]) == 1
    store = Watched(URL)
    uploader(store, run, []).upload_all()
    assert [name.rpartition("/")[2] for name in store.written if "checkpoints/" in name] == [LARGE, MANIFEST]
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket=BUCKET)
    assert complete(run) == ["update-4"]
    assert_downloads(run, tmp_path / "copy")


def test_a_run_continues_from_s3_when_its_directory_is_gone(server: Server, job_dict, tmp_path, shared_ray):
    """The losses are, bit for bit, those of a run that was not interrupted."""
    job = merged(job_dict, train={"max_steps": UPDATES}, checkpoint={"every": 10, "keep": 2})
    whole = fine_tuned(plan_of(job), tmp_path / "whole")
    environment = {**shared_ray, **variables(server.port)}
    (tmp_path / "first").mkdir()
    write_job(tmp_path / "first", job)
    first = Command("run", "job.yaml", f"checkpoint.upload={URL}", folder=tmp_path / "first", **environment)
    first.wait_for(lambda: updates_made(tmp_path / "first") > 12)
    first.interrupt()
    assert first.wait() == 128 + signal.SIGINT, first.output
    run = run_folder(tmp_path / "first")
    made = updates_made(tmp_path / "first")
    assert 12 < made < UPDATES
    assert f"uploaded to      {URL}/{run.name}" in first.output
    shutil.rmtree(tmp_path / "first")

    (tmp_path / "second").mkdir()
    arguments = (f"{URL}/{run.name}", "--to", str(tmp_path / "second/runs"))
    second = Command("resume", *arguments, folder=tmp_path / "second", **environment)
    assert second.wait() == 0, second.output
    assert f"downloading update-{made}" in second.output and f"resuming after update {made}" in second.output
    resumed = RunDir(run_folder(tmp_path / "second"))
    assert [line["loss"] for line in resumed.metrics()] == [line["loss"] for line in whole.metrics()]
    assert resumed.evaluations()[-1]["loss"] == whole.evaluations()[-1]["loss"]

    names = {name.removeprefix(f"runs/{run.name}/") for name in server.names()}
    assert {"job.yaml", "plan.json", "metrics.jsonl", "evaluations.jsonl", "events.jsonl"} < names
    manifests = {name for name in names if name.endswith(MANIFEST)}
    kept = sorted(resumed.complete_checkpoints())
    assert manifests == {f"export/{MANIFEST}", *(f"checkpoints/update-{update}/{MANIFEST}" for update in kept)}
    assert "export/model.safetensors" in names and kept[-1] == UPDATES
    for text in (second.output, resumed.events_file.read_text(), resumed.plan_file.read_text()):
        assert "secret-of-the-test" not in text


def test_a_restart_from_an_earlier_checkpoint_replaces_what_was_uploaded(
    server: Server, started: Start, without_fault: dict[str, object], shared_ray, monkeypatch
):
    """The newest checkpoint is uploaded, and then damaged on the disk."""
    running = started("training", {**shared_ray, **variables(server.port)}, checkpoint={"upload": URL})
    run = RunDir(run_folder(running.folder))
    use(monkeypatch, server.port)
    wait_until(lambda: complete(run) == ["update-2", "update-4"])
    os.truncate(next(run.checkpoint(4).glob("*_states.pt")), 1000)
    running.ranks()[1].kill()
    check_results(running, without_fault, attempts=2)
    assert "resuming after update 2 of 8" in running.output
    found = remote_checkpoints(Store(URL), run.path.name).complete
    manifests = [(run.checkpoint(update) / MANIFEST).read_bytes() for update in run.complete_checkpoints()]
    assert [each.digest for each in found] == [hashlib.sha256(manifest).hexdigest() for manifest in manifests]


def test_the_checkpoints_of_a_url_are_listed(server, run, monkeypatch):
    use(monkeypatch, server.port)
    uploader(Store(URL), run, []).upload_all()
    ended = command("checkpoints", f"{URL}/{run.path.name}")
    assert ended.status == 0 and "update-4" in ended.out and "complete" in ended.out


def wait_until(condition) -> None:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

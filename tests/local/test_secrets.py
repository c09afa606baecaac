"""Planted secrets are in no file of a run, in no log, in no temporary folder and in no process's arguments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.local.launcher_commands import Command, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.local.s3_server import BUCKET, s3_server, variables
from tests.local.test_hang import stopped_rank

pytestmark = pytest.mark.local

SECRETS = {
    name: f"planted-{number}-{os.getpid()}"
    for number, name in enumerate(
        (
            *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            *("AWS_SESSION_TOKEN", "MY_PASSWORD", "LAUNCHER_SECRET", "DS_DB_PASSWD", "NCCL_KEY"),
        )
    )
}
IN_JOB = f"planted-in-the-job-{os.getpid()}"
PLACES = (Path("/tmp"), Path("/dev/shm"))


def where_found(texts: dict[str, str], files: list[Path]) -> set[str]:
    """The names of the secrets with each file or process's arguments in which they are."""
    found = set()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError:
            continue  # a socket, or removed meanwhile
        found |= {f"{name} in {file}" for name, text in texts.items() if text.encode() in content}
    for process in psutil.process_iter():
        line = "\0".join(arguments_of(process))
        found |= {f"{name} in the arguments of {line[:80]}" for name, text in texts.items() if text in line}
    return found


def arguments_of(process: psutil.Process) -> list[str]:
    """The arguments of a process; none if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def files_below(folder: Path) -> list[Path]:
    """Every regular file; os.walk skips what is removed meanwhile."""
    return [path for top, _, names in os.walk(folder) for name in names if (path := Path(top, name)).is_file()]


def of_this_run(command: Command) -> list[Path]:
    """The temporary files that are newer than the command, those of its Ray among them."""
    began, found = psutil.Process(command.process.pid).create_time() - 1, []
    for path in (path for place in PLACES for path in files_below(place)):
        try:
            if path.stat().st_mtime >= began and command.folder not in path.parents:
                found.append(path)
        except OSError:
            continue
    return found


def ray_folder(command: Command) -> Path:
    """The folder of the Ray that the command started."""
    (folder,) = {
        Path("/".join(word.split("=", 1)[-1].split("/")[:3]))
        for process in command.started.values()
        for word in arguments_of(process)
        if "/tmp/lr-" in word and word.split("=", 1)[-1].startswith("/tmp/lr-")
    }
    return folder


@contextmanager
def paused(command: Command) -> Iterator[None]:
    """The ranks do not end meanwhile: on a busy machine it takes longer to read /tmp than to train."""
    ranks = command.ranks().values()
    for process in ranks:
        process.suspend()
    try:
        yield
    finally:
        for process in ranks:
            # A script may end its ranks meanwhile.
            with suppress(psutil.NoSuchProcess):
                process.resume()


def look_for_secrets(command: Command, texts: dict[str, str]) -> set[str]:
    """Where secrets are while the ranks train, and at the end; the token of Ray counts as one."""
    command.wait_for(lambda: updates_made(command.folder) > 0)
    with paused(command):
        ray = ray_folder(command)
        own = {**texts, "Ray's token": (ray / "token").read_text()}
        temporary = of_this_run(command)
        assert any(ray in path.parents for path in temporary)
        found = where_found(own, [path for path in temporary if path != ray / "token"])
        found |= where_found(own, files_below(command.folder))
    assert command.wait() == 0, command.output
    return found | where_found(own, files_below(command.folder))


def test_a_training(job_dict, tmp_path, forked):
    job = merged(job_dict, train={"max_steps": 40, "eval_every": 20, "hang_seconds": 0}, checkpoint={"every": 20})
    command = Command("run", str(write_job(tmp_path, job)), folder=tmp_path, **forked, **SECRETS)
    assert look_for_secrets(command, SECRETS) == set()


def test_a_training_that_hangs_restarts_and_is_uploaded(job_dict, tmp_path, shared_ray):
    """Neither the stacks and logs of its attempts, nor its objects in S3 and their download, have the credentials."""
    with s3_server() as server:
        environment = {**shared_ray, **variables(server.port), **SECRETS}
        job = merged(job_dict, checkpoint={"upload": f"s3://{BUCKET}/runs"})
        first = stopped_rank(job, tmp_path, environment, restarts=1, max_steps=100)
        first.wait_for(lambda: "restarting" in first.output)
        found = where_found(SECRETS, [*of_this_run(first), *files_below(tmp_path)])
        assert first.wait() == 0, first.output
        run = run_folder(tmp_path)
        assert "uploaded to" in first.output
        assert {"attempt.json", "stacks.txt", "rank-1.attempt-2.log"} <= {path.name for path in files_below(run)}
        arguments = ("--download-only", "--to", str(tmp_path / "copy"))
        second = Command("resume", f"s3://{BUCKET}/runs/{run.name}", *arguments, folder=tmp_path, **environment)
        found |= where_found(SECRETS, [])
        assert second.wait() == 0, second.output
        (copy,) = (tmp_path / "copy").iterdir()
        assert "checkpoints" in {path.name for path in copy.iterdir()}
        names = server.names()
        for name in names:
            content = server.client().get_object(Bucket=BUCKET, Key=name)["Body"].read()
            found |= {f"{secret} in {name}" for secret, text in SECRETS.items() if text.encode() in content}
    assert len(names) > 5 and found | where_found(SECRETS, files_below(tmp_path)) == set()


def test_a_script_that_gets_them(tmp_path, forked):
    """Its environment has the secrets of its trackers. One in the job file is in the run's copies of the job alone."""
    shutil.copy(Path(__file__).parent / "scripts/plain_ddp.py", tmp_path)
    job = {
        "name": "mine",
        "train": {"max_steps": 400, "train_micro_batch_size_per_gpu": 2},
        "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 3},
        "cluster": {"gpus_per_node": 0, "processes_per_node": 2, "env": {"DB_PASSWORD": IN_JOB}},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    script = ("exec", "job.yaml", "--", "-m", "plain_ddp", "--report", "--steps", "400")
    command = Command(*script, folder=tmp_path, **forked, **SECRETS)
    found = look_for_secrets(command, {**SECRETS, "DB_PASSWORD": IN_JOB})
    run = run_folder(tmp_path)
    assert run is not None
    assert found == {f"DB_PASSWORD in {path}" for path in (file, run / "job.yaml", run / "plan.json")}
    assert "cluster.env.DB_PASSWORD looks like a secret" in command.output
    log = next(run.glob("logs/node-*/rank-0.log")).read_text()
    assert f"a secret of {len(SECRETS['WANDB_API_KEY'])} characters" in log

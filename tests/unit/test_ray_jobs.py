"""The request for a Ray cluster: its contents, and what is rejected before anything is sent."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher import ray_jobs
from launcher.errors import RequestError
from launcher.fleet.ray_settings import read_variables_again
from launcher.job import validate_job
from launcher.ray_jobs import ENTRYPOINT_SCRIPT, dashboard_address, ray_request, submit_to_ray
from launcher.run_dir import RunDir
from tests.unit.inputs import command, write_folder

HERE = Path("/shared/project")
ADDRESS = "http://head:8265"


def job(**sections: Any):
    given = {"name": "tune", "model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}, "output_dir": "/shared/runs"}
    return validate_job({**given, **sections})


def request(overrides=(), address=ADDRESS, job_file=HERE / "jobs/my job.yaml", **sections: Any):
    return ray_request(job(**sections), job_file, overrides, address, HERE)


def refused(**options: Any) -> str:
    with pytest.raises(RequestError) as error:
        request(**options)
    return str(error.value)


def test_the_request_has_everything_that_ray_receives(capsys):
    made = request(
        ["train.max_steps=5", "schedule.warmup=2M tokens"], cluster={"nodes": 2, "env": {"NCCL_DEBUG": "INFO"}}
    )
    words = ["launcher", "run", "jobs/my job.yaml", "train.max_steps=5", "schedule.warmup=2M tokens"]
    assert made.arguments() == {
        "entrypoint": shlex.join(["sh", "-c", ENTRYPOINT_SCRIPT, *words]),
        "runtime_env": {"working_dir": "/shared/project", "excludes": [], "env_vars": {"NCCL_DEBUG": "INFO"}},
        "metadata": {"launcher_job": "tune", "launcher_output_dir": "/shared/runs"},
    }
    assert submit_to_ray(made, print, dry_run=True, parsable=False, follow=False) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == {"address": ADDRESS, **made.arguments()}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), st.text("a b'$`;&\"\\\n|*", min_size=1))
def test_arguments_pass_through_the_shell_unchanged(overrides, name):
    made = request(overrides, job_file=HERE / f"x{name}.yaml")
    assert shlex.split(made.entrypoint)[3:] == ["launcher", "run", f"x{name}.yaml", *overrides]


@pytest.fixture
def programs(tmp_path):
    """A folder for the PATH that has what the shell script needs, but no launcher and no Python."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "tr", "sed"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def run_entrypoint(programs: Path, cwd: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Runs an entrypoint as Ray's job supervisor does, as a child of a raylet that was started with `python`."""
    entrypoint = shlex.join(["sh", "-c", ENTRYPOINT_SCRIPT, "launcher", "run", "my job.yaml", "a=$b 'c'"])
    raylet = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1], shell=True).returncode)"
    option = f"--python_worker_command={python} /ray/default_worker.py --port=1"
    command = [sys.executable, "-c", raylet, entrypoint, option]
    return subprocess.run(command, cwd=cwd, env={"PATH": str(programs)}, capture_output=True, text=True)


def test_the_launcher_is_found_without_the_path_of_the_cluster(tmp_path, programs):
    """It is found in the Python that Ray runs; a launcher.py in the job's folder does not replace it."""
    (tmp_path / "launcher.py").write_text("raise SystemExit('the wrong one')")
    done = run_entrypoint(programs, tmp_path, sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert "my job.yaml" in done.stderr and "the wrong one" not in done.stderr

    done = run_entrypoint(programs, tmp_path, "/nowhere/python")
    assert done.returncode == 127
    assert f"is neither on the PATH of this Ray ({programs}) nor in its Python (/nowhere/python)" in done.stderr

    (programs / "launcher").write_text("#!/bin/sh\nprintf '%s,' \"$@\"\n")
    (programs / "launcher").chmod(0o755)
    done = run_entrypoint(programs, tmp_path, "/nowhere/python")
    assert (done.returncode, done.stdout) == (0, "run,my job.yaml,a=$b 'c',"), done.stderr


class StartingRay(BaseHTTPRequestHandler):
    """The dashboard of a Ray whose agent is still starting; the second attempt succeeds."""

    attempts = 0

    def do_GET(self):
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "0", "session_name": "s"}
        self._answer(200, json.dumps(version if self.path == "/api/version" else {}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        StartingRay.attempts += 1
        if StartingRay.attempts == 1:
            self._answer(500, "No available agent to submit job, please try again later.")
        else:
            self._answer(200, json.dumps({"job_id": "1", "submission_id": "raysubmit_1"}))

    def _answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def test_submission_is_retried_while_ray_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_jobs, "_RETRY_SECONDS", 0.0)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Another test may have imported Ray with a token.
    read_variables_again()
    with HTTPServer(("127.0.0.1", 0), StartingRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        made = ray_request(job(), tmp_path / "job.yaml", [], address, tmp_path)
        assert submit_to_ray(made, print, dry_run=False, parsable=True, follow=False) == 0
        server.shutdown()
    printed = capsys.readouterr()
    assert printed.out == "raysubmit_1\n"
    assert printed.err.count(f"the Ray at {address} does not accept jobs yet: trying again for up to 60 s\n") == 1
    assert StartingRay.attempts == 2


def test_output_of_runs_is_not_uploaded():
    made = request(output_dir="/shared/project/out/run*s", data={"train": "t", "cache_dir": "/shared/project/cache"})
    assert made.excludes == ("/out/run\\*s/", "/cache/")
    assert request(output_dir="/shared/project").excludes == ()


def test_paths_are_relative_to_this_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/shared")
    made = request(output_dir="~/project/runs", data={"train": "t", "cache_dir": "build/../cache"})
    assert made.excludes == ("/runs/", "/cache/")
    assert request(data={"train": "t", "cache_dir": "../cache"}).excludes == ()
    assert shlex.split(request(job_file=HERE / "a/../job.yaml").entrypoint)[5] == "job.yaml"
    assert "is not inside /shared/project" in refused(job_file=HERE / "../job.yaml")


TO_RAY = ("submit", "job.yaml", "--to", "ray", "--address", ADDRESS, "--dry-run", "output_dir=/shared/runs")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_files_on_the_cluster_are_not_looked_for():
    there = ("model.name_or_path=/there/model", "data.train=[/there/a.jsonl]", "deepspeed=/there/ds.json")
    for more in ((), there, ("cluster.gpus_per_node=auto", "cluster.processes_per_node=auto"), ("model.lora={r: 8}",)):
        ended = command(*TO_RAY, *more)
        assert ended.status == 0, ended.err
        assert shlex.split(yaml.safe_load(ended.out)["entrypoint"])[6:] == ["output_dir=/shared/runs", *more]
        assert ("batch sizes are checked on the cluster" in ended.err) == ("cluster.gpus_per_node=auto" in more)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name_or_path=./modle", "model.name_or_path: folder not found: modle"),
        ("data.train=data/trian.jsonl", "data.train: no file matches data/trian.jsonl"),
        ("data.eval=data/none.jsonl", "data.eval: no file matches data/none.jsonl"),
        ("deepspeed=zero9", "the file zero9 does not exist"),
        ("deepspeed={zero_optimisation: {stage: 2}}", "zero_optimisation"),
        ("train.train_batch_size=3", "train_batch_size"),
        ("cluster.gpus_per_node=3", "4 processes and 3 GPUs per node"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_errors_that_do_not_depend_on_the_cluster_are_reported_first(override, words):
    ended = command(*TO_RAY, override)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "head:8265"}, "'head:8265' is not the address of a Ray dashboard"),
        ({"address": "ray://head:10001"}, "http://HEAD:8265"),
        ({"address": "http://me:pudding@head:8265"}, "RAY_AUTH_TOKEN_PATH"),
        ({"output_dir": "runs"}, "output_dir: runs would be in the job's working directory"),
        ({"cluster": {"address": "local"}}, "cluster.address: local is not an address at which a run can join"),
        ({"cluster": {"address": "http://head:8265"}}, "set the dashboard's address with --address"),
        ({"cluster": {"env": {"HF_TOKEN": "hf_abc"}}}, "cluster.env.HF_TOKEN: looks like a secret"),
        ({"cluster": {"env": {"AWS_SECRET_ACCESS_KEY": "abc"}}}, "set it on the nodes themselves"),
        ({"job_file": Path("/elsewhere/job.yaml")}, "is not inside /shared/project"),
    ],
)
def test_a_request_that_would_fail_or_show_secrets_is_rejected(options, words):
    assert words in refused(**options)


def test_an_error_shows_every_problem_and_no_secret():
    message = refused(address="nowhere", output_dir="runs", cluster={"env": {"API_KEY": "sesame"}})
    assert "sesame" not in message
    assert [key in message for key in ("--address", "output_dir", "API_KEY")] == [True] * 3
    assert "pudding" not in refused(address="http://me:pudding@head:8265")


def test_names_that_only_resemble_secrets_are_accepted():
    env = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "uk", "MONKEY_PATCH": "1"}
    assert request(cluster={"env": env}).env_vars == env


def test_the_address_is_given_or_from_rays_variables():
    there = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}
    assert dashboard_address("http://c:3", there) == "http://c:3"
    assert dashboard_address(None, there) == "http://a:1"
    assert dashboard_address(None, {"RAY_ADDRESS": "http://b:2"}) == "http://b:2"
    with pytest.raises(RequestError, match="--address http://HEAD:8265"):
        dashboard_address(None, {})


def test_a_run_records_its_ray_job(tmp_path, monkeypatch):
    run = RunDir.create(tmp_path, "tune")
    run.enter("planning")
    assert "ray_job_id" not in run.state()
    config = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1", "job_name": "x"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    run.enter("training")
    assert run.state()["ray_job_id"] == "raysubmit_1"

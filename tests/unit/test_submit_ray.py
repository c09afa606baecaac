"""The request for a Ray cluster: what is in it, what is not, and what is refused before anything is sent."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.job import validate_job
from launcher.run_dir import RunDir
from launcher.submit.ray import dashboard_address, ray_request, submit_to_ray
from tests.unit.given import command, write_folder

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


def test_the_request_is_what_ray_is_told(capsys):
    made = request(
        ["train.max_steps=5", "schedule.warmup=2M tokens"], cluster={"nodes": 2, "env": {"NCCL_DEBUG": "INFO"}}
    )
    assert made.arguments() == {
        "entrypoint": "launcher run 'jobs/my job.yaml' train.max_steps=5 'schedule.warmup=2M tokens'",
        "runtime_env": {"working_dir": "/shared/project", "excludes": [], "env_vars": {"NCCL_DEBUG": "INFO"}},
        "metadata": {"launcher_job": "tune", "launcher_output_dir": "/shared/runs"},
    }
    assert submit_to_ray(made, print, dry_run=True, parsable=False, follow=False) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == {"address": ADDRESS, **made.arguments()}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), st.text("a b'$`;&\"\\\n|*", min_size=1))
def test_arguments_arrive_through_the_shell_unharmed(overrides, name):
    made = request(overrides, job_file=HERE / f"x{name}.yaml")
    assert shlex.split(made.entrypoint) == ["launcher", "run", f"x{name}.yaml", *overrides]


def test_what_runs_write_is_not_uploaded():
    made = request(output_dir="/shared/project/out/run*s", data={"train": "t", "cache_dir": "/shared/project/cache"})
    assert made.excludes == ("/out/run\\*s/", "/cache/")
    assert request(output_dir="/shared/project").excludes == ()


def test_paths_are_read_as_on_the_way_from_this_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/shared")
    made = request(output_dir="~/project/runs", data={"train": "t", "cache_dir": "build/../cache"})
    assert made.excludes == ("/runs/", "/cache/")
    assert request(data={"train": "t", "cache_dir": "../cache"}).excludes == ()
    assert shlex.split(request(job_file=HERE / "a/../job.yaml").entrypoint)[2] == "job.yaml"
    assert "does not lie under /shared/project" in refused(job_file=HERE / "../job.yaml")


TO_RAY = ("submit", "job.yaml", "--to", "ray", "--address", ADDRESS, "--dry-run", "output_dir=/shared/runs")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_what_is_not_here_but_on_the_cluster_is_not_looked_for():
    there = ("model.name_or_path=/there/model", "data.train=[/there/a.jsonl]", "deepspeed=/there/ds.json")
    for more in ((), there, ("cluster.gpus_per_node=auto", "cluster.processes_per_node=auto"), ("model.lora={r: 8}",)):
        ended = command(*TO_RAY, *more)
        assert ended.status == 0, ended.err
        assert shlex.split(yaml.safe_load(ended.out)["entrypoint"])[3:] == ["output_dir=/shared/runs", *more]
        assert ("the cluster alone sees how many ranks" in ended.err) == ("cluster.gpus_per_node=auto" in more)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name_or_path=./modle", "model.name_or_path: there is no folder modle"),
        ("data.train=data/trian.jsonl", "data.train: no file matches data/trian.jsonl"),
        ("data.eval=data/none.jsonl", "data.eval: no file matches data/none.jsonl"),
        ("deepspeed=zero9", "there is no file zero9"),
        ("deepspeed={zero_optimisation: {stage: 2}}", "zero_optimisation"),
        ("train.train_batch_size=3", "train_batch_size"),
        ("cluster.gpus_per_node=3", "4 processes and 3 GPUs a node"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_wrong_wherever_it_runs_is_told_before_it_is_sent(override, words):
    ended = command(*TO_RAY, override)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "head:8265"}, "'head:8265' is no address that jobs are submitted to"),
        ({"address": "ray://head:10001"}, "http://HEAD:8265"),
        ({"address": "http://me:pudding@head:8265"}, "RAY_AUTH_TOKEN_PATH"),
        ({"output_dir": "runs"}, "output_dir: runs would lie in the job's working directory"),
        ({"cluster": {"address": "local"}}, "cluster.address: local is not where a run joins"),
        ({"cluster": {"address": "http://head:8265"}}, "give the dashboard's address with --address"),
        ({"cluster": {"env": {"HF_TOKEN": "hf_abc"}}}, "cluster.env.HF_TOKEN: looks like a secret"),
        ({"cluster": {"env": {"AWS_SECRET_ACCESS_KEY": "abc"}}}, "set it on the nodes themselves"),
        ({"job_file": Path("/elsewhere/job.yaml")}, "does not lie under /shared/project"),
    ],
)
def test_a_request_that_would_fail_or_tell_is_refused(options, words):
    assert words in refused(**options)


def test_a_refusal_tells_no_secret_and_every_problem():
    told = refused(address="nowhere", output_dir="runs", cluster={"env": {"API_KEY": "sesame"}})
    assert "sesame" not in told
    assert [key in told for key in ("--address", "output_dir", "API_KEY")] == [True] * 3
    assert "pudding" not in refused(address="http://me:pudding@head:8265")


def test_names_that_only_sound_like_secrets_pass():
    env = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "uk", "MONKEY_PATCH": "1"}
    assert request(cluster={"env": env}).env_vars == env


def test_the_address_is_given_or_stands_where_ray_looks_for_it():
    there = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}
    assert dashboard_address("http://c:3", there) == "http://c:3"
    assert dashboard_address(None, there) == "http://a:1"
    assert dashboard_address(None, {"RAY_ADDRESS": "http://b:2"}) == "http://b:2"
    with pytest.raises(RequestError, match="--address http://HEAD:8265"):
        dashboard_address(None, {})


def test_a_run_knows_the_ray_job_that_it_runs_in(tmp_path, monkeypatch):
    run = RunDir.create(tmp_path, "tune")
    run.enter("planning")
    assert "ray_job_id" not in run.state()
    told = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1", "job_name": "x"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    run.enter("training")
    assert run.state()["ray_job_id"] == "raysubmit_1"

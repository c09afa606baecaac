"""The rule for secret environment variables, and everything that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RequestError
from launcher.fleet.environment import forwarded_environment
from launcher.job import load_job, validate_job
from launcher.runs.planning import check_job
from launcher.secret_names import is_secret
from tests.unit.inputs import job_of, write_folder
from tests.unit.slurm.test_submit import request_of
from tests.unit.test_ray_jobs import refused as refused_by_ray

SECRETS = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_CREDENTIALS",
    "DS_DB_PASSWD",
    "DS_DB_PASSWORD",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "OPENAI_API_KEY",
    "COMET_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "NEPTUNE_API_TOKEN",
    "DB_PASS",
    "DB_PWD",
    "PGPASSWORD",
    "SESSION_COOKIE",
    "NETRC_AUTH",
    "HTTP_AUTH_HEADER",
    "SLURM_JWT",
    "GITHUB_TOKEN1",
    "hf_token",
    "hfToken",
    "MY_SECRET",
    "SECRET",
    "KEY",
    "SSH_KEY_PASSPHRASE",
    "GITHUB_AUTHTOKEN",
    "AZURE_CREDENTIAL",
    "HF_TOKEN_2",
    "LAUNCHER_APIKEY",
    "TORCH_KEYS",
    "GITHUB_PAT",
    "HF_CREDS",
    "DS_DB_PW",
    "HTTP_AUTHORIZATION",
    "SENTRY_DSN",
    "SLACK_WEBHOOK_URL",
]
HARMLESS = [
    "TOKENIZERS_PARALLELISM",
    "KEYBOARD",
    "MONKEY_PATCH",
    "MAX_TOKENS",
    "NCCL_IB_PKEY",
    "NCCL_IB_PKEY1",
    "PWD",
    "OLDPWD",
    "AUTHOR",
    "GIT_AUTHOR_NAME",
    "HF_TOKEN_PATH",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "SSH_AUTH_SOCK",
    "AWS_SHARED_CREDENTIALS_FILE",
    "BYPASS",
    "COMPASS_ON",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "PASSENGERS",
    "SECRETARY",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "NCCL_DEBUG",
    "HOTKEYS",
    "TORCH_LOGS",
    "COOKIECUTTER_REPLAY",
    "PYTHONPATH",
    "PATTERN",
    "AUTHORIZED_HOSTS",
]


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_recognised_by_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_similar_names_are_not_secrets(name: str) -> None:
    assert not is_secret(name)


def test_secrets_are_forwarded_only_to_scripts() -> None:
    own = dict.fromkeys(("HF_TOKEN", "HF_CREDENTIALS", "DS_DB_PASSWD", "HF_HOME", "TOKENIZERS_PARALLELISM"), "x")
    assert set(forwarded_environment(own)) == {"HF_HOME", "TOKENIZERS_PARALLELISM"}
    assert forwarded_environment(own, script=True) == own


@pytest.mark.parametrize("name", ["HF_CREDENTIALS", "DS_DB_PASSWD", "WANDB_API_KEY"])
def test_both_ways_to_submit_refuse_a_secret_in_the_job(name: str) -> None:
    message = refused_by_ray(cluster={"env": {name: "sesame"}})
    assert f"cluster.env.{name}: looks like a secret" in message and "sesame" not in message
    with pytest.raises(RequestError, match=f"cluster.env.{name}: looks like a secret") as caught:
        request_of(job_of(cluster={"gpus_per_node": 0, "env": {name: "sesame"}}))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", ["`touch x`", "| touch x", "", "A B", "A=B", "1A", "A-B", "A.B", "É", "A\n", "$(x)"])
def test_invalid_variable_names_are_refused(name: str) -> None:
    job = {"model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}, "cluster": {"env": {name: "1"}}}
    with pytest.raises(RequestError, match=r"cluster\.env.*must be the name of an environment variable"):
        validate_job(job)


def test_a_plan_warns_of_a_secret_in_the_job_file_without_printing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    job = load_job(tmp_path / "job.yaml", "cluster.env={HF_TOKEN: sesame, NCCL_DEBUG: INFO}")
    [note] = [note for note in check_job(job).notes if "secret" in note]
    assert note.startswith("cluster.env.HF_TOKEN looks like a secret") and "sesame" not in note

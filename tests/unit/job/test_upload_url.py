"""Which URLs of cloud storage are accepted; a refused one is never printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.job.upload_url import checked_url, is_url
from tests.unit.inputs import JOB, command, write_folder


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://my.bucket-1/a path/b/", "s3://my.bucket-1/a path/b"),
        ("gs://bucket/a@b", "gs://bucket/a@b"),
        ("file:///mnt/shared/runs//", "file:///mnt/shared/runs"),
    ],
)
def test_urls_that_are_accepted(given: str, used: str) -> None:
    assert checked_url(given) == used and is_url(given)


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("given", "reason", "hint"),
    [
        (f"s3://user:{SECRET}@bucket/path", "must not contain a user or a password", "AWS_ACCESS_KEY_ID"),
        (f"s3://user%3A{SECRET}%40bucket/path", "must not contain a user or a password", "in the environment"),
        (f"s3://bucket/path?X-Amz-Signature={SECRET}", "must not contain ? or #", "environment"),
        (f"s3://bucket/path#{SECRET}", "must not contain ? or #", "environment"),
        (f"https://user:{SECRET}@host/path", "must not contain a user or a password", "environment"),
        (f"user:{SECRET}@host/path", "must be a URL, not a path", "s3://BUCKET/PATH"),
        ("runs/copies", "must be a URL, not a path", "file:///ABSOLUTE/PATH"),
        ("~/copies", "must be a URL, not a path", "file:///ABSOLUTE/PATH"),
        ("/mnt/copies", "must be a URL, not a path", "write file:///mnt/copies;"),
        ("s3:/bucket/path", "must be a URL, not a path", "s3://BUCKET/PATH"),
        ("file://copies/a", "must contain an absolute path after file://", "file:///ABSOLUTE/PATH"),
        ("file:///", "must contain an absolute path after file://", "three slashes"),
        ("s3a://bucket/path", "the protocol s3a:// is not supported", "write s3://"),
        ("https://host/path", "the protocol https:// is not supported", "gs://BUCKET/PATH"),
        ("s3://", "the name of the bucket is missing or not valid", "s3://BUCKET/PATH"),
        ("s3:///path", "the name of the bucket is missing or not valid", "s3://BUCKET/PATH"),
        ("s3://-bucket/path", "the name of the bucket is missing or not valid", "s3://BUCKET/PATH"),
        ("s3://bucket/../other", "must not contain . or .. as a folder", "s3://BUCKET/PATH"),
        ("'s3://bucket/a\\tb'", "must not contain control characters", "s3://BUCKET/PATH"),
    ],
)
def test_urls_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, reason: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value = given if "#" not in given and "\\" not in given else '"' + given.strip("'") + '"'
    write_folder(tmp_path, JOB + f"checkpoint:\n  upload: {value}\n")
    ended = command("run", "job.yaml")
    assert ended.status == 2 and f"job.yaml:5: checkpoint.upload: {reason}" in ended.err, ended.err
    assert hint in ended.err and SECRET not in ended.err + ended.out
    assert not (tmp_path / "runs").exists()
    ended = command("run", "job.yaml", f"checkpoint.upload={value}")
    assert ended.status == 2 and f"command line: checkpoint.upload: {reason}" in ended.err


def test_storage_that_cannot_be_written_to_stops_a_job_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, JOB)
    (tmp_path / "bucket").write_text("a file")
    ended = command("run", "job.yaml", f"checkpoint.upload=file://{tmp_path}/bucket/runs")
    assert ended.status == 2
    assert f"command line: checkpoint.upload: cannot write to file://{tmp_path}/bucket/runs" in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_missing_package_is_named_with_the_extra_that_contains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, JOB)
    # gcsfs is in no extra of the tests.
    ended = command("run", "job.yaml", "checkpoint.upload=gs://bucket/runs")
    assert ended.status == 2
    assert "command line: checkpoint.upload: gs:// needs the package gcsfs" in ended.err
    assert "pip install 'ray-deepspeed-launcher[gs]'" in ended.err


def test_the_plan_of_a_script_warns_that_it_uploads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "job.yaml").write_text(
        "cluster: {gpus_per_node: 0}\nschedule: {peak_lr: 1e-4}\n"
        "train: {max_steps: 4, train_batch_size: 8, train_micro_batch_size_per_gpu: 8}\ncheckpoint: {upload: 's3://bucket/runs'}\n"
    )
    ended = command("exec", "--dry-run", "job.yaml", "--", "train.py")
    assert ended.status == 0, ended.err
    assert "checkpoint.upload is set, but a script's files are not uploaded" in " ".join(ended.out.split())

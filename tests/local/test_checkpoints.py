"""Checkpoints of real ranks: their manifests."""

from __future__ import annotations

import pytest

from launcher.manifest import file_records, files_in, read_manifest
from tests.local.harness import fine_tuned, merged, plan_of
from tests.local.test_losses import zero_config

pytestmark = pytest.mark.local


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_file_is_listed_once(job_dict, tmp_path, stage):
    job = merged(job_dict, train={"max_steps": 1}, export=False, deepspeed=zero_config(stage))
    folder = fine_tuned(plan_of(job), tmp_path).checkpoint(1)
    manifest = read_manifest(folder)
    names = files_in(folder)
    assert {f"random-{rank}.pt" for rank in range(2)} < set(names)
    assert manifest["files"] == file_records(folder, names)

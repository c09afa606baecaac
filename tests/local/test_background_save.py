"""Checkpoints that real ranks write in the background: their content, a resume, and a rank killed while it writes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from launcher.manifest import content_fault, read_manifest
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from tests.local.rank_runs import fine_tuned, logs, merged, plan_of, run_directory, run_ranks
from tests.local.test_losses import zero_config

pytestmark = pytest.mark.local

UPDATES, SAVED = 8, (2, 4, 6, 8)


def plan_with(job: dict, stage: int, *, background: bool, **sections) -> Plan:
    checkpoint = {"every": 2, "keep": 9, "background": background}
    job = merged(job, train={"max_steps": UPDATES}, checkpoint=checkpoint, deepspeed=zero_config(stage), **sections)
    plan = plan_of(merged(job, export=False))
    assert (plan.training.background_copy_bytes is not None) == background
    return plan


def started_at(run: RunDir, update: int) -> Start:
    manifest = read_manifest(run.checkpoint(update))
    assert manifest is not None
    return Start(checkpoint=str(run.checkpoint(update)), update=update, samples=manifest["samples"])


def without_plan(file: Path, folder: Path) -> bytes:
    """A file of DeepSpeed, read and written again without the hash of the plan."""
    state = torch.load(file, weights_only=False)
    del state["plan_sha256"]
    torch.save(state, folder / "state.pt")
    return (folder / "state.pt").read_bytes()


def same_files(run: RunDir, other: RunDir, update: int, folder: Path) -> None:
    """The plans of the two runs differ in `checkpoint.background`; all else is equal to the last bit."""
    one, two = (read_manifest(each.checkpoint(update)) for each in (run, other))
    assert one is not None and two is not None
    assert one["files"].keys() == two["files"].keys()
    assert content_fault(run.checkpoint(update)) is None
    for name, record in one["files"].items():
        if name.endswith("model_states.pt"):
            files = (each.checkpoint(update) / name for each in (run, other))
            first, second = (without_plan(file, folder) for file in files)
            assert first == second, name
        else:
            assert record == two["files"][name], name


def tensor_bytes(file: Path) -> int:
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)


@pytest.mark.parametrize(
    ("stage", "model"), [(0, {}), (1, {}), (2, {"lora": {"r": 4}}), (3, {"freeze": ["*embed_tokens*"]})]
)
def test_files_and_a_resume_equal_those_of_a_run_that_waits(job_dict, tmp_path, stage, model):
    waits, plan = (plan_with(job_dict, stage, background=background, model=model) for background in (False, True))
    whole, run = fine_tuned(waits, tmp_path / "waits"), fine_tuned(plan, tmp_path / "background")
    assert run.complete_checkpoints() == list(SAVED)
    for update in SAVED:
        same_files(run, whole, update, tmp_path)
    saved = sum(tensor_bytes(file) for file in run.checkpoint(4).glob("*_states.pt"))
    assert plan.training.background_copy_bytes == pytest.approx(saved, rel=0.02)

    resumed = fine_tuned(plan, tmp_path / "resumed", start=started_at(run, 4))
    assert [line["loss"] for line in resumed.metrics()] == [line["loss"] for line in whole.metrics()[4:]]
    for update in (6, 8):
        same_files(resumed, whole, update, tmp_path)


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(job_dict, tmp_path):
    whole = fine_tuned(plan_with(job_dict, 2, background=False), tmp_path / "whole")
    plan = plan_with(job_dict, 2, background=True)
    run = run_directory(plan, tmp_path / "killed")
    reports = run_ranks(
        plan,
        run,
        command=("-m", "tests.local.faulty_worker"),
        environments={1: {"LAUNCHER_FAULT": "killed_while_writing:4"}},
    )
    assert -9 in [report["code"] for report in reports if report["report"] == "exit"], logs(run)
    assert len(run.metrics()) >= 5, "training did not continue while the checkpoint was written"
    assert run.checkpoint(4).is_dir()
    assert run.usable_checkpoints() == [2]
    resumed = fine_tuned(plan, tmp_path / "resumed", start=started_at(run, 2))
    assert [line["loss"] for line in resumed.metrics()] == [line["loss"] for line in whole.metrics()[2:]]
    same_files(resumed, whole, 8, tmp_path)

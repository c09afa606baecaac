"""Checkpoints of real ranks: their manifests, and damaged ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from launcher.manifest import content_fault, file_records, files_in, read_manifest, universal_folder
from launcher.run_dir import RunDir
from tests.fork_server import fork_environment
from tests.local.launcher_commands import Command
from tests.local.rank_runs import fine_tuned, merged, plan_of, run_directory, run_ranks
from tests.local.test_losses import zero_config

pytestmark = pytest.mark.local


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_file_is_listed_once(job_dict, tmp_path, stage):
    job = merged(job_dict, train={"max_steps": 1}, export=False, deepspeed=zero_config(stage))
    run = fine_tuned(plan_of(job), tmp_path)
    folder = run.checkpoint(1)
    manifest = read_manifest(folder)
    names = files_in(folder)
    assert {f"random-{rank}.pt" for rank in range(2)} < set(names)
    assert manifest["files"] == file_records(folder, names)
    assert manifest["evaluation_loss"] == run.evaluations()[-1]["loss"]


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


_ALIGNMENT = 512


def replaced(file: Path, payload: Payload) -> None:
    """A pickle with a payload in place of a file of the same size, in the format that torch.save writes."""
    size = file.stat().st_size
    torch.save([payload, ""], file)
    # torch.save aligns what it writes, so the length of the text and that of the file do not grow by the same number.
    torch.save([payload, "x" * (size - file.stat().st_size - _ALIGNMENT)], file)
    written = file.read_bytes()
    assert len(written) <= size
    file.write_bytes(written.ljust(size, b"\0"))


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_checkpoints_are_never_loaded(job_dict, tmp_path, shared_ray):
    """A pickle of the same name, and a flipped bit: an export and a resume use the checkpoint before them."""
    job = merged(job_dict, train={"max_steps": 8}, checkpoint={"every": 2, "keep": 9}, deepspeed=zero_config(2))
    plan = plan_of(job)
    whole = fine_tuned(plan, tmp_path / "whole")
    run = run_directory(plan, tmp_path / "cut")
    run_ranks(plan, run, stop_at=5)
    made = run.complete_checkpoints()
    assert made[:3] == [2, 4, 6]
    for update in made[3:]:
        shutil.rmtree(run.checkpoint(update))

    payload, bait = Payload(tmp_path / "executed"), tmp_path / "bait.pt"
    (optimizer,) = run.checkpoint(6).glob("*_pp_rank_1_*optim_states.pt")
    shutil.copy(optimizer, bait)
    for file in (bait, optimizer):
        replaced(file, payload)
    torch.load(bait, weights_only=False)
    payload.folder.rmdir()
    flip_bit(run.checkpoint(4) / "mp_rank_00_model_states.pt")

    exported = Command(
        "export", str(run.path), "--output", str(tmp_path / "export"), folder=tmp_path, **fork_environment()
    )
    assert exported.wait() == 0, exported.output
    assert "exporting update-2 instead" in exported.output
    (run.checkpoints / "update-6.damaged-1").rename(run.checkpoint(6))

    resumed = Command("resume", str(run.path), "export=false", folder=tmp_path, **shared_ray)
    assert resumed.wait() == 0, resumed.output
    output = " ".join(resumed.output.split())
    assert f"update-6 cannot be used: {optimizer.name} has changed since it was saved" in output
    assert "using update-2 instead" in output
    assert not payload.folder.exists()
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in whole.metrics()]
    assert damaged_names(run) == {"update-4.damaged-1", "update-6.damaged-1"}


def damaged_names(run: RunDir) -> set[str]:
    return {path.name for path in run.checkpoints.glob("*.damaged-*")}


def test_a_damaged_conversion_is_made_again(job_dict, tmp_path, shared_ray):
    job = merged(job_dict, train={"max_steps": 6}, checkpoint={"every": 2}, export=False, deepspeed=zero_config(2))
    plan = plan_of(job)
    run = run_directory(plan, tmp_path)
    run_ranks(plan, run, stop_at=2)
    newest = run.checkpoint(run.complete_checkpoints()[-1])
    extra = universal_folder(newest) / "mp_rank_01_model_states.pt"
    extra.parent.mkdir()
    torch.save(Payload(tmp_path / "executed"), extra)
    arguments = ("cluster.processes_per_node=1", "checkpoint.keep=9")
    resumed = Command("resume", str(run.path), *arguments, folder=tmp_path, **shared_ray)
    assert resumed.wait() == 0, resumed.output
    assert "converting again" in resumed.output and not (tmp_path / "executed").exists()
    assert content_fault(universal_folder(newest)) is None and not extra.exists()

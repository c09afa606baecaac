"""`launcher checkpoints`: the state of each checkpoint, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.manifest import MANIFEST
from launcher.run_dir import RunDir
from tests.unit.inputs import command, plan_of
from tests.unit.runs.test_checkpoints import BEFORE, NEWEST, cut, extra_pickle, flip_bit, save

STARTED = 12


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with two checkpoints, one that is being saved, and one that was set aside."""
    run = RunDir.create(tmp_path / "runs", "tiny")
    plan = plan_of()
    run.plan_file.write_text(plan.to_json())
    for update in (NEWEST, BEFORE):
        save(run, plan, update)
    run.checkpoint(STARTED).mkdir()
    (run.checkpoint(STARTED) / "optim_states.pt").write_bytes(bytes(300))
    (run.checkpoints / "update-8.damaged-1").mkdir()
    (run.checkpoints / "update-8-universal").mkdir()
    return run


def listed(run: RunDir, *options: str, status: int = 0) -> dict[str, dict[str, Any]]:
    ended = command("checkpoints", str(run.path), "--json", *options)
    assert (ended.status, ended.err) == (status, "")
    return {each["name"]: each for each in json.loads(ended.out)}


def test_every_checkpoint_is_listed_with_its_state(run: RunDir) -> None:
    found = listed(run)
    assert {name: each["state"] for name, each in found.items()} == {
        "update-4": "complete",
        "update-8": "complete",
        "update-8.damaged-1": "set aside",
        "update-12": "incomplete",
    }
    plan = plan_of()
    newest = found["update-8"]
    assert (newest["update"], newest["samples"]) == (NEWEST, NEWEST * plan.train_batch_size)
    assert (newest["ranks"], newest["path"]) == (plan.world.size, str(run.checkpoint(NEWEST)))
    assert newest["bytes"] == sum(file.stat().st_size for file in run.checkpoint(NEWEST).glob("*.pt"))
    assert newest["time"].endswith("Z") and newest["reason"] is None
    assert (found["update-12"]["bytes"], found["update-12"]["samples"]) == (300, None)
    assert found["update-12"]["reason"] == "it has no manifest.json: it was not saved completely"
    table = command("checkpoints", str(run.path)).out
    assert [line.split()[0] for line in table.splitlines()[:5]] == ["checkpoint", *found]


def test_damage_that_sizes_do_not_show_is_found_by_verifying(run: RunDir) -> None:
    assert [each["state"] for each in listed(run, "--verify").values()][:2] == ["verified", "verified"]
    flip_bit(run.checkpoint(BEFORE) / "model_states.pt")
    extra_pickle(run.checkpoint(NEWEST))
    assert [each["state"] for each in listed(run).values()][:2] == ["complete", "complete"]
    found = listed(run, "--verify", status=1)
    assert [found[name]["state"] for name in ("update-4", "update-8")] == ["damaged", "damaged"]
    ended = command("checkpoints", str(run.path), "--verify")
    assert ended.status == 1
    assert "update-4: model_states.pt has changed since it was saved: its checksum differs" in ended.out
    assert "update-8: mp_rank_01_model_states.pt is not listed in manifest.json" in ended.out


def test_a_file_of_another_size_is_damage_without_verifying(run: RunDir) -> None:
    cut(run.checkpoint(NEWEST))
    assert listed(run, status=1)["update-8"]["reason"] == "optim_states.pt has 1113 bytes instead of 1114"


def test_a_manifest_without_checksums_is_not_verified(run: RunDir) -> None:
    file = run.checkpoint(NEWEST) / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["format"]
    manifest["files"] = {name: entry["size"] for name, entry in manifest["files"].items()}
    file.write_text(json.dumps(manifest))
    found = listed(run, "--verify")["update-8"]
    assert (found["state"], found["reason"]) == ("complete", "its manifest.json has no checksums")


def test_a_run_without_checkpoints_or_plan(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "tiny")
    ended = command("checkpoints", str(run.path))
    assert ended.status == 2 and "plan.json" in ended.err
    run.plan_file.write_text(plan_of().to_json())
    ended = command("checkpoints", str(run.path))
    assert (ended.status, ended.out) == (0, "no checkpoints\n")

"""What `launcher lr` says, against DeepSpeed itself and a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from tests.local.launcher_commands import write_job
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.time_limit import TIME_LIMIT_SECONDS

pytestmark = pytest.mark.local


def lr(*arguments: str, folder: Path, columns: int = 80) -> str:
    """What `launcher lr` prints into a pipe."""
    environment = {**os.environ, "COLUMNS": str(columns)}
    code = "from launcher.cli import main; main()"
    line = [sys.executable, "-c", code, "lr", *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def driven(blocks: dict[str, Any], updates: int, steps_before: int) -> list[float]:
    """The rate of every update under DeepSpeed's own class, stepped after each update as the engine does."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=blocks["optimizer"]["params"]["lr"])
    kind = getattr(lr_schedules, blocks["scheduler"]["type"])
    scheduler = kind(optimizer, **blocks["scheduler"]["params"])
    for _ in range(steps_before):
        scheduler.step()
    made = []
    for _ in range(updates):
        made.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return made


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_pasted_blocks_run_one_update_late_until_stepped_once(job_dict: dict, tmp_path: Path, shape: str) -> None:
    schedule = {"shape": shape, "peak_lr": 2e-5, "warmup": 100}
    path = write_job(tmp_path, merged(job_dict, train={"max_steps": 1000}, schedule=schedule))
    found = json.loads(lr(str(path), "--json", folder=tmp_path))
    shown = found["curves"][0]["rates"]
    assert driven(found["blocks"], 1000, steps_before=1) == shown
    pasted = driven(found["blocks"], 1000, steps_before=0)
    assert pasted[1:] == shown[:-1]
    assert f"update 1 at {pasted[1]:.4g}" in found["blocks_notes"][0] or pasted[0] == pasted[1]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupDecayLR", {"total_num_steps": 300, "warmup_num_steps": 30}),
        ("WarmupCosineLR", {"total_num_steps": 300, "warmup_num_steps": 30, "warmup_type": "linear"}),
        ("WarmupLR", {"warmup_num_steps": 30}),
    ],
)
def test_an_existing_json_is_shown_as_deepspeed_drives_it(tmp_path: Path, kind: str, params: dict[str, Any]) -> None:
    blocks = {
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}},
        "scheduler": {"type": kind, "params": params},
    }
    (tmp_path / "ds.json").write_text(json.dumps(blocks))
    found = json.loads(lr("--deepspeed", "ds.json", "--updates", "300", "--json", folder=tmp_path))
    written, fixed = found["curves"]
    assert written["rates"] == driven(blocks, 300, steps_before=0)
    assert fixed["rates"] == driven(found["blocks"], 300, steps_before=1)


def test_a_real_run_was_made_at_the_planned_rates(job_dict: dict, tmp_path: Path) -> None:
    schedule = {"shape": "cosine", "peak_lr": 1e-3, "warmup": 2}
    job = merged(job_dict, train={"max_steps": 6}, schedule=schedule, export=False, checkpoint={"save_final": False})
    run = fine_tuned(plan_of(job), tmp_path)
    found = json.loads(lr(str(run.path), "--json", folder=tmp_path))
    planned, applied = found["curves"]
    assert (planned["name"], applied["name"]) == ("planned", "applied")
    assert applied["rates"] == planned["rates"]
    assert "6 of 6 updates were made, every one at exactly the planned rate." in found["notes"]
    for columns in (80, 120):
        out = lr(str(run.path), folder=tmp_path, columns=columns)
        assert max(len(line) for line in out.splitlines()) <= columns
        assert "\x1b" not in out

"""`launcher run` as a user sees it: it finishes, is interrupted and fails, on its own Ray and on an existing one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import time

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, state_of, updates_made, write_job
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.unit import inputs

pytestmark = pytest.mark.local

LONG = {"max_steps": 100_000}
CHATTER = re.compile(r"\[(INFO|WARNING)\]|raylet|DeepSpeed|deepspeed|Started a local Ray|torch\.distributed|Token auth")


def test_a_run_goes_from_job_file_to_model(job_dict, tmp_path):
    job = merged(job_dict, train={"max_steps": 6, "eval_every": 3}, checkpoint={"every": 2, "keep": 2})
    command = Command("run", str(write_job(tmp_path, job)), "train.max_steps=5", folder=tmp_path)
    assert command.wait() == 0, command.output
    assert command.left_behind() == []

    run = RunDir(run_folder(tmp_path))
    plan = Plan.from_json(run.plan_file.read_text())
    assert plan.length.total_updates == 5
    assert json.loads(run.ds_config_file.read_text()) == plan.ds_config
    assert run.job_file.read_text() == (tmp_path / "job.yaml").read_text()

    states = [event["state"] for event in run.events() if event["event"] == "state"]
    wanted = ["planning", "placing", "starting", "training", "saving", "exporting", "finished"]
    assert [state for state in dict.fromkeys(states) if state != "preparing"] == wanted
    assert run.state()["state"] == "finished"

    lines = run.metrics()
    assert [line["update"] for line in lines] == [0, 1, 2, 3, 4]
    keys = {"samples", "tokens", "loss", "lr", "grad_norm", "step_seconds", "tokens_per_second", "peak_memory_bytes"}
    assert all(keys < set(line) and line["grad_norm"] > 0 and line["tflops"] > 0 for line in lines)
    assert [line["update"] for line in run.evaluations()] == [0, 3, 5]
    assert run.complete_checkpoints() == [4, 5]
    AutoModelForCausalLM.from_pretrained(run.export)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (run.path, *run.path.rglob("*"))}
    assert [str(path) for path, mode in modes.items() if mode & 0o077] == []

    folder = run.node_logs(0, socket.gethostname())
    assert sorted(path.name for path in folder.iterdir()) == ["agent.log", "node.json", "rank-0.log", "rank-1.log"]
    pulse = json.loads((folder / "node.json").read_text())
    assert pulse["ended"] and pulse["memory_bytes"] > pulse["memory_used_bytes"] > 0
    assert len(pulse["ranks"]) == 2
    for number, rank in enumerate(pulse["ranks"]):
        assert (rank["rank"], rank["updates"], rank["exit_code"], rank["alive"]) == (number, 5, 0, False)
        assert 0 < rank["own_seconds"] < rank["step_seconds"]
    for rank in (0, 1):
        text = (folder / f"rank-{rank}.log").read_text()
        assert text
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in text.splitlines())
        assert f"[Rank {1 - rank}]" not in text

    assert not CHATTER.search(command.output), command.output
    for shown in ("finished", str(run.path), str(run.export), "before", "tokens/s"):
        assert shown in command.output


def test_ctrl_c_and_slurms_signals_save_and_the_resumed_run_equals_an_uninterrupted_one(job_dict, tmp_path, shared_ray):
    # Long enough that the signal comes in the middle, whatever the machine is doing.
    job = merged(job_dict, train={"max_steps": 100})
    command = Command("run", str(write_job(tmp_path, job)), folder=tmp_path, **shared_ray)
    command.wait_for(lambda: updates_made(tmp_path) >= 3)
    command.interrupt()
    assert command.wait() == 128 + signal.SIGINT, command.output
    assert command.left_behind() == []
    run = RunDir(run_folder(tmp_path))
    made = len(run.metrics())
    assert 3 <= made < 100
    assert (run.state()["state"], run.state()["reason"]) == ("stopped", "received SIGINT")
    assert run.complete_checkpoints() == [made]
    assert f"launcher resume {run.path}" in command.output

    resumed = Command("resume", str(run.path), folder=tmp_path, **shared_ray)
    resumed.wait_for(lambda: updates_made(tmp_path) >= made + 3)
    # As the terminal goes away, and as Slurm's --signal does before the time limit.
    resumed.interrupt(signal.SIGHUP)
    resumed.interrupt(signal.SIGUSR1)
    assert resumed.wait() == 128 + signal.SIGUSR1, resumed.output
    made = len(run.metrics())
    assert (run.state()["state"], run.state()["reason"]) == ("stopped", "received SIGUSR1")
    assert made < 100 and run.complete_checkpoints()[-1] == made

    resumed = Command("resume", str(run.path), folder=tmp_path, **shared_ray)
    assert resumed.wait() == 0, resumed.output
    one, other = run.metrics(), fine_tuned(plan_of(job), tmp_path / "uninterrupted").metrics()
    for key in ("update", "samples", "tokens", "lr"):
        assert [line[key] for line in one] == [line[key] for line in other]
    np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in other], rtol=1e-6)


def test_ctrl_c_twice_stops_at_once_and_leaves_no_process(job_dict, tmp_path, forked):
    command = Command("run", str(write_job(tmp_path, merged(job_dict, train=LONG))), folder=tmp_path, **forked)
    command.wait_for(lambda: updates_made(tmp_path) >= 2)
    # A rank that no longer answers must not delay the second Ctrl-C.
    command.ranks()[1].suspend()
    # The processes of the run's own Ray get these signals too, and do not end.
    agent = command.agent()
    command.interrupt(signal.SIGHUP)
    command.interrupt(signal.SIGUSR1)
    command.wait_for(lambda: "SIGTERM twice stops it now" in command.output)
    command.interrupt()
    # Two signals at once would be taken for one.
    command.wait_for(lambda: "a second signal stops it now" in command.output)
    assert agent.is_running()
    command.interrupt()
    assert command.wait() == 130, command.output
    assert command.left_behind() == []
    assert state_of(tmp_path)["state"] == "stopped"


def test_a_killed_rank_is_named_and_all_others_end(job_dict, tmp_path, forked):
    command = Command("run", str(write_job(tmp_path, merged(job_dict, train=LONG))), folder=tmp_path, **forked)
    command.wait_for(lambda: updates_made(tmp_path) >= 2)
    command.ranks()[1].kill()
    assert command.wait() == 1, command.output
    assert command.left_behind() == []
    assert f"rank 1 on node 0 ({socket.gethostname()}) failed first, with signal SIGKILL" in command.output
    assert "Traceback" not in command.output.split("the end of")[0]
    assert state_of(tmp_path)["state"] == "failed"
    run = RunDir(run_folder(tmp_path))
    (failure,) = [event for event in run.events() if event["event"] == "failure"]
    assert (failure["rank"], failure["exit_code"], failure["code"]) == (1, -signal.SIGKILL, "rank_killed")
    # The launcher measures whether memory was the cause, and has a count where the kernel keeps one.
    node = json.loads(run.node_file(0, socket.gethostname()).read_text())
    low = node["memory_peak_bytes"] < 0.8 * node["memory_bytes"] and not node.get("oom_kills")
    assert ("most likely not for lack of memory" in command.output) == low


def test_ranks_end_with_their_agent(job_dict, tmp_path, forked):
    command = Command("run", str(write_job(tmp_path, merged(job_dict, train=LONG))), folder=tmp_path, **forked)
    command.wait_for(lambda: updates_made(tmp_path) >= 2)
    ranks = list(command.ranks().values())
    assert len(ranks) == 2
    command.agent().kill()
    assert command.wait() == 1, command.output
    assert "is lost" in command.output
    assert not [rank for rank in ranks if rank.is_running()]
    assert command.left_behind() == []


def test_a_killed_launcher_leaves_no_process(job_dict, tmp_path, forked):
    command = Command("run", str(write_job(tmp_path, merged(job_dict, train=LONG))), folder=tmp_path, **forked)
    command.wait_for(lambda: updates_made(tmp_path) >= 2)
    ranks = command.ranks()
    assert len(ranks) == 2
    command.process.kill()
    command.process.wait()
    # Its lock is free now, so the run counts as lost.
    run = run_folder(tmp_path)
    assert json.loads(inputs.command("status", str(run), "--json").out)["state"] == "lost"
    why = inputs.command("why", str(run)).out
    assert why.startswith(f"the run is lost: its supervisor, process {command.process.pid} on {socket.gethostname()}, ")
    assert "out of memory" not in why
    assert command.left_behind(*RAYS_OWN_AGENTS) == []


def test_the_data_of_a_live_run_is_kept_in_the_cache(job_dict, tmp_path, forked):
    cache = tmp_path / "cache"
    changes = {"train": LONG, "data": {"cache_dir": str(cache)}}
    command = Command("run", str(write_job(tmp_path, merged(job_dict, **changes))), folder=tmp_path, **forked)
    command.wait_for(lambda: updates_made(tmp_path) >= 2)
    (used,) = cache.glob("uses/*/used")
    (entry,) = (cache / "data").iterdir()
    before = time.time() - 3600
    for file in (used, entry / "facts.json"):
        os.utime(file, (before, before))
    kept = inputs.command("cache", "clean", str(cache), "--all")
    assert "a live run uses it" in kept.out
    assert (entry / "train/tokens.i32").is_file()
    command.process.kill()
    command.process.wait()
    assert "removed 1 entry" in inputs.command("cache", "clean", str(cache), "--all").out
    assert not entry.exists()
    assert command.left_behind(*RAYS_OWN_AGENTS) == []


def test_an_invalid_job_starts_no_process_and_leaves_no_directory(job_dict, tmp_path):
    job = merged(job_dict, data={"max_length": 100_000})
    command = Command("run", str(write_job(tmp_path, job)), folder=tmp_path)
    assert command.wait() == 2
    assert "max_length: 100000 is more than the 128 positions of this model" in command.output
    assert run_folder(tmp_path) is None
    assert command.left_behind() == []


def test_a_run_joins_an_existing_ray_and_gives_its_processors_back(job_dict, tmp_path, shared_ray):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    command = Command("run", str(write_job(first, job_dict)), folder=first, **shared_ray)
    assert command.wait() == 0, command.output
    assert command.left_behind() == []
    # The processors were given back: a run that asks for a second node finds them free.
    two = merged(job_dict, train={"train_micro_batch_size_per_gpu": 2}, cluster={"nodes": 2, "wait_seconds": 2})
    beyond = Command("run", str(write_job(second, two)), folder=second, **shared_ray)
    assert beyond.wait() == 1
    found = "asked for 2 nodes with 2 CPU each; nodes in this Ray: 1, large enough: 1"
    assert found in " ".join(beyond.output.split())
    assert "Traceback" not in beyond.output

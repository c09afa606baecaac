"""Runs that stop early and export their best checkpoint: the same decision after a resume on other ranks."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.run_dir import RunDir, read_manifest
from launcher.watch.why import explain
from tests.local.launcher_commands import Command, run_folder, write_job
from tests.local.rank_runs import logs, merged, plan_of, run_directory, run_ranks

pytestmark = pytest.mark.local

UPDATES, EVERY, PATIENCE, MIN_DELTA = 40, 2, 3, 0.06


def overfitting(job_dict: dict[str, Any]) -> dict[str, Any]:
    """A job whose evaluation loss first falls by more than MIN_DELTA per evaluation, and then stays where it is."""
    stopping = {"patience": PATIENCE, "min_delta": MIN_DELTA}
    return merged(
        job_dict,
        train={"max_steps": UPDATES, "eval_every": EVERY, "early_stopping": stopping},
        schedule={"shape": "constant", "peak_lr": 1e-2, "warmup": 2, "allow_unsafe": True, "on_spike": "warn"},
        checkpoint={"every": EVERY, "keep": 1, "keep_best": 1},
        deepspeed="zero1",
        export="best",
    )


def expected_end(run: RunDir) -> tuple[int, int]:
    """(update of the lowest evaluation loss, update at which the run must end), by the definition of the rule."""
    losses = {line["update"]: line["loss"] for line in run.evaluations()}
    in_a_row = 0
    for update in list(losses)[1:]:
        lowest = min(loss for earlier, loss in losses.items() if earlier < update)
        in_a_row = 0 if losses[update] < lowest - MIN_DELTA else in_a_row + 1
        if in_a_row == PATIENCE:
            return min(losses, key=lambda each: losses[each]), update
    raise AssertionError(f"the run must not end early: {losses}")


def assert_stopped_early(run: RunDir) -> tuple[int, int]:
    """The run ended when the rule says, without a further evaluation or update. Returns (best, last)."""
    best, last = expected_end(run)
    assert 0 < best < last < UPDATES
    assert [line["update"] for line in run.evaluations()] == list(range(0, last + 1, EVERY))
    assert [line["update"] for line in run.metrics()] == list(range(last))
    state = run.state()
    assert (state["state"], state["update"]) == ("finished", last)
    assert "early stopping: the evaluation loss did not improve by more than 0.06 in 3 evaluations" in state["reason"]
    (event,) = [each for each in run.events() if each["event"] == "early_stop"]
    assert (event["update"], event["best_update"], event["reason"]) == (last, best, state["reason"])
    assert run.complete_checkpoints() == [best, last]
    assert (read_manifest(run.checkpoint(last)) or {})["early_stop"] == state["reason"]
    assert "early_stop" not in (read_manifest(run.checkpoint(best)) or {})
    assert explain(run).ok and state["reason"] in explain(run).headline
    return best, last


def assert_exported(run: RunDir, update: int) -> None:
    """The export has the weights of the checkpoint after `update` updates, bit for bit, and of no other one."""
    exported = load_file(run.export / "model.safetensors")
    differing = set()
    for saved in run.complete_checkpoints():
        states = torch.load(run.checkpoint(saved) / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        assert exported.keys() <= states.keys()
        if any(not torch.equal(tensor, states[name]) for name, tensor in exported.items()):
            differing.add(saved)
    assert differing == set(run.complete_checkpoints()) - {update}


def test_a_run_ends_early_exports_its_best_checkpoint_and_continues_only_on_request(
    job_dict: dict[str, Any], tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    def resumed(*overrides: str) -> Command:
        command = Command("resume", str(run.path), *overrides, folder=tmp_path, **shared_ray)
        command.wait()
        return command

    command = Command("run", str(write_job(tmp_path, overfitting(job_dict))), folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    run = RunDir(run_folder(tmp_path))
    best, last = assert_stopped_early(run)
    assert_exported(run, best)
    assert f"finished after {last} updates" in command.output
    assert f"reason           {run.state()['reason']}" in command.output
    assert f"(update {best}, evaluation loss" in command.output

    shutil.rmtree(run.export)
    again = resumed()
    assert again.wait() == 0, again.output
    assert f"the run ended after {last} updates (early stopping" in again.output
    assert_stopped_early(run)
    assert_exported(run, best)

    refused = resumed("cluster.processes_per_node=1")
    assert refused.wait() == 2, refused.output
    assert "continue training with train.early_stopping=null" in refused.output

    to_the_end = resumed("train.early_stopping=null")
    assert to_the_end.wait() == 0, to_the_end.output
    assert [line["update"] for line in run.metrics()] == list(range(UPDATES))
    assert (run.state()["state"], run.state()["reason"]) == ("finished", None)
    assert_exported(run, min(run.evaluations(), key=lambda line: line["loss"])["update"])


def test_a_run_that_is_resumed_on_other_ranks_ends_at_the_same_update(
    job_dict: dict[str, Any], tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    """The interruption comes between the best evaluation and the stop: the evaluations before it must count."""
    plan = plan_of(overfitting(job_dict))
    whole = run_directory(plan, tmp_path / "whole")
    run_ranks(plan, whole)
    best, last = expected_end(whole)
    (event,) = [each for each in whole.events() if each["event"] == "early_stop"]
    assert (event["update"], event["best_update"]) == (last, best)

    run = run_directory(plan, tmp_path / "cut")
    reports = run_ranks(plan, run, stop_at=last - EVERY - 1)
    assert [each["update"] for each in reports if each["report"] == "stopped"] in ([last - 2] * 2, [last - 1] * 2), (
        logs(run)
    )
    command = Command("resume", str(run.path), "cluster.processes_per_node=1", folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    assert "2 → 1 ranks" in command.output
    assert assert_stopped_early(run) == (best, last)
    assert_exported(run, best)
    losses = [line["loss"] for line in run.evaluations()]
    assert losses == pytest.approx([line["loss"] for line in whole.evaluations()], rel=1e-2)


def test_a_run_that_is_killed_while_exporting_after_its_early_stop_only_exports(
    job_dict: dict[str, Any], tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    plan = plan_of({**overfitting(job_dict), "export": "last"})
    run = run_directory(plan, tmp_path)
    reports = run_ranks(plan, run, command=("-m", "tests.local.dying_worker"))
    assert [each["code"] for each in reports if each["report"] == "exit"] == [-signal.SIGKILL] * 2, logs(run)
    _, last = expected_end(run)
    command = Command("resume", str(run.path), folder=tmp_path, **shared_ray)
    assert command.wait() == 0, command.output
    assert f"the run ended after {last} updates (early stopping" in command.output
    assert_stopped_early(run)
    assert_exported(run, last)


def test_a_spike_at_the_same_update_stops_the_run_instead(job_dict: dict[str, Any], tmp_path: Path) -> None:
    """The user must decide what to do about the spike, so the run is not finished."""
    spike, stopping = 43, {"patience": 1, "min_delta": 1000}
    job = merged(
        job_dict,
        train={"max_steps": 60, "eval_every": spike, "early_stopping": stopping},
        schedule={"warmup": 20, "peak_lr": 3e-4, "on_spike": "stop"},
        export=False,
    )
    plan = plan_of(job)
    run, fault = run_directory(plan, tmp_path), {"LAUNCHER_FAULT": "losses_jump:40"}
    command = ("-P", "-m", "tests.local.faulty_worker")
    reports = run_ranks(plan, run, command=command, environments={0: fault, 1: fault})
    assert {(each["update"], each["code"]) for each in reports if each["report"] == "stopped"} == {
        (spike, "loss_spike")
    }
    assert [line["update"] for line in run.evaluations()] == [0, spike]
    assert not [each for each in run.events() if each["event"] == "early_stop"]
    assert "early_stop" not in (read_manifest(run.checkpoint(spike)) or {})

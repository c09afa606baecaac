"""Attempts to carry out a plan: what happens between a failure and the next start of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import FailureCode, RunFailed
from launcher.fleet.failures import Failure
from launcher.fleet.nodes import Node
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir, write_atomic, write_manifest
from launcher.runs import attempts as attempts_module
from launcher.runs import supervisor as supervision
from launcher.runs.attempts import Attempts
from launcher.runs.interrupts import Interrupts
from launcher.runs.outcome import Outcome
from tests.unit.inputs import job_of, plan_of
from tests.unit.runs.test_supervisor import RecordingConsole

UPDATES = 20
Act = Callable[["Ranks", Start | None], Outcome]


class Nodes:
    """No real nodes. Counts how often they are released."""

    nodes = (Node(None, "h0", "10.0.0.1", ()),)
    broken = False
    own_ray = False

    def __init__(self, *_: Any) -> None:
        self.closed = 0
        self.excluded: dict[str, str] = {}

    def end(self, _grace_seconds: float) -> None:
        if self.broken:
            raise ConnectionError("Ray does not answer")

    def restart_own_ray(self) -> None:
        """No Ray was started."""

    def all_answer(self) -> bool:
        return True

    def close(self) -> None:
        self.closed += 1
        if self.broken:
            raise ConnectionError("Ray is gone")


class Ranks(supervision.Supervisor):
    """A supervisor whose attempts act as given, one function per attempt."""

    acts: list[Act]

    def run(self, start: Start | None = None) -> Outcome:
        self.attempt = self.run_dir.begin_attempt()
        self.starts.append((self.attempt, start and start.update, self.plan.sha256))
        return self.acts.pop(0)(self, start)

    starts: list[tuple[int, int | None, str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    directory = RunDir.create(tmp_path, "run")
    write_atomic(directory.plan_file, a_plan().to_json())
    return directory


@pytest.fixture(autouse=True)
def _imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    Ranks.acts, Ranks.starts = [], []
    monkeypatch.setattr(attempts_module, "Nodes", Nodes)
    monkeypatch.setattr(supervision, "Supervisor", Ranks)
    monkeypatch.setattr(attempts_module.time, "sleep", lambda _: None)
    monkeypatch.setattr(Nodes, "broken", False)


def a_plan(**train: Any) -> Plan:
    return plan_of(job_of(train={"max_steps": UPDATES, **train}, export=False))


def attempts_of(run: RunDir, *acts: Act, plan: Plan | None = None) -> tuple[Attempts, Callable[[], Outcome]]:
    console: Any = RecordingConsole()
    Ranks.acts = list(acts)
    attempts = Attempts(run, console, Interrupts(console))
    return attempts, lambda: attempts.run(plan or a_plan(), run.plan_file, None)


def save(run: RunDir, update: int, plan: Plan | None = None, **facts_of_end: str) -> None:
    folder = run.checkpoint(update)
    folder.mkdir(parents=True)
    facts = {"update": update, "samples": 8 * update, "world_size": 8, "plan_sha256": (plan or a_plan()).sha256}
    write_manifest(folder, {}, **facts, **facts_of_end)  # type: ignore[arg-type]


def fails(code: FailureCode = FailureCode.RANK_KILLED, error: str = "killed", save_at: int | None = None) -> Act:
    def act(ranks: Ranks, start: Start | None) -> Outcome:
        if save_at is not None:
            save(ranks.run_dir, save_at)
        ranks.updates_made = (start.update if start else 0) + 3
        ranks.failures = [Failure(0, 0, 0.0, "an exception", error, code=code)]
        raise RunFailed(f"rank 0 failed: {error}", code=code)

    return act


def finishes(_ranks: Ranks, _start: Start | None) -> Outcome:
    return Outcome("finished", UPDATES)


def test_a_restart_starts_from_the_newest_checkpoint_under_its_plan(run: RunDir) -> None:
    attempts, carry_out = attempts_of(run, fails(save_at=4), fails(save_at=8), finishes)
    assert carry_out() == Outcome("finished", UPDATES)
    assert [(number, update) for number, update, _ in Ranks.starts] == [(1, None), (2, 4), (3, 8)]
    restarts = [(each["attempt"], each["update"]) for each in run.events() if each["event"] == "restart"]
    assert restarts == [(2, 4), (3, 8)]
    assert attempts.plan.sha256 == a_plan().sha256


def test_without_a_checkpoint_a_restart_repeats_all_updates(run: RunDir) -> None:
    run.metrics_file.write_text('{"update": 0, "samples": 8, "loss": 1.0}\n')
    _, carry_out = attempts_of(run, fails(), finishes)
    carry_out()
    assert [update for _, update, _ in Ranks.starts] == [None, None]
    assert run.metrics() == []
    assert len(list(run.path.glob("metrics.undone-*.jsonl"))) == 1


def test_the_plan_of_a_resume_is_kept_until_it_has_saved_a_checkpoint(run: RunDir) -> None:
    """The newest checkpoint is that of the plan before the resume, which changed the plan."""
    save(run, 4)
    changed = a_plan(weight_decay=0.5)
    start = Start(checkpoint=str(run.checkpoint(4)), update=4, samples=32)
    attempts, _ = attempts_of(run, fails(), finishes)
    attempts.run(changed, run.path / "plan.revision-1.json", start)
    assert Ranks.starts == [(1, 4, changed.sha256), (2, 4, changed.sha256)]


def test_a_damaged_checkpoint_is_set_aside_before_a_restart(run: RunDir) -> None:
    def damage(ranks: Ranks, start: Start | None) -> Outcome:
        save(run, 4)
        save(run, 8)
        (run.checkpoint(8) / "manifest.json").write_text("{")
        return fails()(ranks, start)

    _, carry_out = attempts_of(run, damage, finishes)
    carry_out()
    assert [update for _, update, _ in Ranks.starts] == [None, 4]
    assert (run.checkpoints / "update-8.damaged-1").is_dir()


def test_a_failure_after_the_last_checkpoint_finishes_the_run(run: RunDir) -> None:
    _, carry_out = attempts_of(run, fails(save_at=UPDATES))
    assert carry_out() == Outcome("finished", UPDATES)


def test_a_failure_after_an_early_stop_finishes_the_run_with_its_reason(run: RunDir) -> None:
    def stops_early(ranks: Ranks, start: Start | None) -> Outcome:
        save(run, 8, early_stop="early stopping: no improvement")
        return fails()(ranks, start)

    _, carry_out = attempts_of(run, stops_early)
    assert carry_out() == Outcome("finished", 8, "early stopping: no improvement")


def test_a_run_that_continues_after_an_early_stop_restarts_from_there(run: RunDir) -> None:
    """The user resumed it without early stopping, and it failed before its next checkpoint."""
    save(run, 8, early_stop="early stopping: no improvement")
    start = Start(checkpoint=str(run.checkpoint(8)), update=8, samples=64)
    attempts, _ = attempts_of(run, fails(), finishes)
    attempts.run(a_plan(), run.plan_file, start)
    assert [update for _, update, _ in Ranks.starts] == [8, 8]


def test_the_run_fails_with_the_reason_when_no_restart_is_left(run: RunDir) -> None:
    attempts, carry_out = attempts_of(run, fails(), fails(), fails(), fails(), finishes)
    with pytest.raises(RunFailed, match="rank 0 failed: killed"):
        carry_out()
    assert len(Ranks.starts) == 4
    (last,) = [event for event in run.events() if event["event"] == "no_restart"]
    assert last["reason"] == "3 restarts failed without a new checkpoint (train.restarts=3)"
    assert attempts._nodes is not None and attempts._nodes.closed == 1


@pytest.mark.parametrize("code", [FailureCode.NAN_LOSS, FailureCode.DISK_FULL])
def test_other_failures_end_the_run(run: RunDir, code: FailureCode) -> None:
    _, carry_out = attempts_of(run, fails(code), finishes)
    with pytest.raises(RunFailed):
        carry_out()


def test_a_failure_while_stopping_is_not_restarted(run: RunDir) -> None:
    def stopping(ranks: Ranks, start: Start | None) -> Outcome:
        ranks.phase = "training"
        ranks.request_stop(15)
        return fails()(ranks, start)

    _, carry_out = attempts_of(run, stopping, finishes)
    with pytest.raises(RunFailed):
        carry_out()


def test_without_ray_the_nodes_are_not_released(run: RunDir) -> None:
    """Every call would wait until Ray ends this process."""
    attempts, carry_out = attempts_of(run, fails(FailureCode.RAY_LOST))
    with pytest.raises(RunFailed):
        carry_out()
    assert attempts._nodes is not None and attempts._nodes.closed == 0


def test_errors_while_the_nodes_are_released_do_not_hide_the_failure(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nodes, "broken", True)
    attempts, carry_out = attempts_of(run, fails(FailureCode.NAN_LOSS))
    with pytest.raises(RunFailed, match="rank 0 failed"):
        carry_out()
    assert attempts._console.notes[-1].strip() == "the nodes could not be released: Ray is gone"  # type: ignore[attr-defined]

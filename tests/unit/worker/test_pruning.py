"""Whenever a process dies, the newest complete checkpoint of its run still exists.

A hook of the interpreter sees each file operation, and ends the process there, or lets the operation fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.manifest import content_fault, read_manifest
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.worker.checkpoint import Checkpoints, Progress
from tests.unit.worker.fake_engine import SavingEngine, fake_ranks, small_plan

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir"}
DEATHS = {"killed": 2100, "failing": 240}
"""Over all values of `keep`. After a failed operation a process may continue, so that these take longer."""
MOST_OPERATIONS = 120
"""Two saves with pruning take about as many operations."""


class Killed(BaseException):
    """The process is dead: no handler can make it do anything more."""


class Disk:
    """Counts the file operations, and ends the process or fails at one of them."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.fails = False
        sys.addaudithook(self._before)

    def _before(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left is None or event not in OPERATIONS:
            return
        # A thread of an earlier test, such as the heartbeat of a lock, belongs to no process that dies here.
        if not threading.current_thread().name.startswith(("MainThread", "checkpoint")):
            return
        # pytest reads source lines when it reports what an object or thread of an earlier test raises.
        if event == "open" and str(arguments[0]).endswith((".py", ".pyc")):
            return
        self.left -= 1
        if self.left == 0 and self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        # A dead process makes no further operation: not even those of its exception handlers.
        if self.left <= 0 and not self.fails:
            raise Killed


@pytest.fixture(scope="module")
def disk() -> Disk:
    return Disk()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    yield
    disk.left = None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: the test makes and removes many files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as found:
        yield Path(found)


def good(run: RunDir) -> dict[int, int]:
    """The samples of the usable checkpoints by update; the content of the newest is verified."""
    found = {}
    for update in run.usable_checkpoints():
        manifest = read_manifest(run.saved_checkpoint(update))
        assert manifest is not None
        found[update] = manifest["samples"]
    if found:
        assert content_fault(run.saved_checkpoint(max(found, key=lambda update: found[update]))) is None
    return found


def session(run: RunDir, plan: Plan, batch: int, samples: int, saved: list[int], *, background: bool = False) -> None:
    """A process that resumes after `samples` and saves until it ends. Appends the samples of each finished save.

    With `background`, all saves but the last are written in the background while updates are made.
    """
    checkpoints = Checkpoints(run, plan, fake_ranks(), lambda _: None)
    pending = 0
    try:
        for step in range(4):
            # The first save is that of a stop at once, on other ranks: it replaces the checkpoint it started from.
            reached = samples + 8 * batch * step
            if not reached:
                continue
            later = background and step < 3
            checkpoints.save(SavingEngine(0), Progress(reached // batch, reached), plan.sha256, {}, background=later)
            saved += [pending] if pending else []
            saved += [] if later else [reached]
            pending = reached if later else 0
            for _ in range(3):
                checkpoints.agree(float(checkpoints.written))
    finally:
        # A thread of a dead process makes no operation either, so it must end before the disk works again.
        checkpoints._thread.shutdown()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("ending", DEATHS)
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoint_survives_every_death(
    folder: Path, disk: Disk, keep: int, ending: str, background: bool
) -> None:
    """Each finished save is there afterwards, and no fewer checkpoints than before or `keep`."""
    chance = random.Random(keep)
    plan = small_plan(checkpoint={"keep": keep})
    disk.fails = ending == "failing"
    deaths = 0
    while deaths < DEATHS[ending] // 3:
        run = RunDir.create(folder, "run", str(deaths))
        found: dict[int, int] = {}
        for _ in range(6):
            before, newest = len(found), max(found.values(), default=0)
            saved = [newest]
            disk.left = chance.randrange(1, MOST_OPERATIONS)
            try:
                session(run, plan, chance.choice((8, 16)), newest, saved, background=background)
                died = False
            except (Killed, OSError):
                died = True
            disk.left = None
            found = good(run)
            assert max(found.values(), default=0) >= saved[-1], (found, saved)
            assert len(found) >= min(keep, before)
            assert died or disk.fails or len(found) <= keep
            deaths += died
        shutil.rmtree(run.path)


@pytest.mark.parametrize("background", [False, True])
def test_what_a_dead_process_left_is_removed_by_the_next_save(folder: Path, disk: Disk, background: bool) -> None:
    plan = small_plan(checkpoint={"keep": 2})
    for operations in range(1, MOST_OPERATIONS):
        run = RunDir.create(folder, f"run-{operations}")
        disk.fails, disk.left = False, operations
        with contextlib.suppress(Killed):
            session(run, plan, 8, 0, [], background=background)
        disk.left = None
        session(run, plan, 8, 0, [], background=background)
        assert {path.name for path in run.checkpoints.iterdir()} == {"update-16", "update-24"}


def test_a_damaged_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    plan = small_plan(checkpoint={"keep": 2})
    checkpoints = Checkpoints(run, plan, fake_ranks(), lambda _: None)
    for update in (1, 2, 3):
        checkpoints.save(SavingEngine(0), Progress(update, 8 * update), plan.sha256, {})
        if update == 2:
            (run.checkpoint(2) / "model.pt").write_bytes(bytes((run.checkpoint(2) / "model.pt").stat().st_size))
    assert run.usable_checkpoints() == [1, 3]

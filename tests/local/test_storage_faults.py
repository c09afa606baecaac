"""A disk that becomes full, and a run directory that is removed: the run ends with the reason, and can be resumed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.manifest import content_fault
from launcher.run_dir import RunDir
from tests.local.fault_runs import Start, check_results, let_continue
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder
from tests.needs import need
from tests.unit.inputs import command

pytestmark = pytest.mark.local

_PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for the runs, which `fill` fills."""
    need("only root can mount a file system" if os.geteuid() else None)
    folder = tmp_path / "faulty" / "runs"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, but_bytes: int = 0) -> Path:
    """Fills the disk but for some bytes. Returns the file to remove."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * _PAGE) == _PAGE:
                pass
        except OSError:
            pass
    os.truncate(filler, filler.stat().st_size - but_bytes)
    return filler


def end_last_page(file: Path) -> None:
    """Makes the next line that is appended need a new page: blank lines do not count."""
    with file.open("ab") as opened:
        opened.write(b"\n" * (-file.stat().st_size % _PAGE))


@pytest.mark.parametrize("moment", ["training", "saving", "exporting"])
def test_a_full_disk_ends_the_run_and_a_resume_continues_once_there_is_space(
    moment: str, without_fault: dict[str, object], started: Start, shared_ray: dict[str, str], small_disk: Path
) -> None:
    running = started(moment, shared_ray)
    run = RunDir(run_folder(running.folder))
    saved = run.complete_checkpoints()
    end_last_page(run.metrics_file)
    # An export begins with small files: it is the library that writes the weights that fails.
    filler = fill(small_disk, but_bytes=64 * 1024 if moment == "exporting" else 0)
    let_continue(running)
    assert running.wait() == 1, running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
    assert (run.state()["state"], run.state()["code"]) == ("failed", "disk_full")
    assert [content_fault(run.checkpoint(update)) for update in saved] == [None] * len(saved)
    for text in (running.output, command("why", str(run.path)).out):
        assert "failed first, with exit code 1: " in text
        assert "not restarted: it would fail again in the same way" in text
        assert "likely cause: the disk is full" in text and "Traceback" not in text
    filler.unlink()
    resumed = Command("resume", str(run.path), folder=running.folder, **shared_ray)
    check_results(resumed, without_fault, attempts=1 if moment == "exporting" else 2)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_a_removed_run_directory_ends_the_run(
    moment: str, started: Start, shared_ray: dict[str, str], tmp_path: Path
) -> None:
    running = started(moment, shared_ray)
    run = run_folder(running.folder)
    # A file that is written meanwhile would stop shutil.rmtree.
    run.rename(tmp_path / "removed")
    assert running.wait() == 1, running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
    assert f"error: the run directory {run} was removed during the run\n" in running.output
    assert "Traceback" not in running.output and "restarting (" not in running.output
    assert not run.exists()

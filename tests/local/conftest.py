"""What the local tests share: one process group in this process, the fork server, and a Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.run_dir import RunDir
from tests.fork_server import fork_environment
from tests.local import launcher_commands
from tests.local.fault_runs import Start, faulty_job, results, waiting_ranks
from tests.local.launcher_commands import Command, existing_ray, run_folder, write_job

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="session")
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for the whole session: DeepSpeed keeps hold of the first that it sees."""
    import deepspeed
    import torch

    store = tmp_path_factory.mktemp("store") / "store"
    # Only inference uses this kernel, and building it takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ONE_PROCESS.items():
            environment.setenv(name, value)
        deepspeed.init_distributed(
            dist_backend="gloo", auto_mpi_discovery=False, init_method=f"file://{store}", rank=0, world_size=1
        )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_process(_process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def forked() -> dict[str, str]:
    """The variables with which a command's ranks, measuring and exporting processes are forks; see fork_server."""
    return fork_environment()


@pytest.fixture(scope="session")
def shared_ray(forked: dict[str, str]) -> Iterator[dict[str, str]]:
    """The variables of a Ray with three processors for tests that do not look at its start and end; ranks are forks."""
    with existing_ray(cpus=3, **forked) as variables:
        yield variables


@pytest.fixture(scope="session")
def _results_without_fault() -> dict[str, object]:
    """The results of the run without a fault, once it was made."""
    return {}


@pytest.fixture
def without_fault(
    job_dict: dict, tmp_path: Path, shared_ray: dict[str, str], _results_without_fault: dict[str, object]
) -> dict[str, object]:
    """The results of the run of fault_runs without a fault."""
    if not _results_without_fault:
        (tmp_path / "plain").mkdir()
        file = write_job(tmp_path / "plain", faulty_job(job_dict))
        command = Command("run", str(file), folder=tmp_path / "plain", **shared_ray)
        assert command.wait() == 0, command.output
        _results_without_fault.update(results(RunDir(run_folder(tmp_path / "plain"))))
    return _results_without_fault


@pytest.fixture
def started(job_dict: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a run of fault_runs, both of whose ranks wait at a moment ("none": never); returns once they do."""

    def start(moment: str, environment: dict[str, str], setup: str = "", **sections: object) -> Command:
        folder = tmp_path / "faulty"
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(launcher_commands, "LAUNCHER", launcher_commands.launcher_with("waiting_worker", setup))
        file = write_job(folder, faulty_job(job_dict, moment, **sections))
        running = Command("run", str(file), folder=folder, **environment)
        running.wait_for(lambda: moment == "none" or waiting_ranks(running) == 2)
        return running

    return start

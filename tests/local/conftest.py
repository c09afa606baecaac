"""What the local tests share: one process group in this process, the fork server, and a Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fork_server import fork_environment
from tests.local.launcher_commands import existing_ray

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="session")
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process group for the session: DeepSpeed keeps the first that it gets."""
    deepspeed = pytest.importorskip("deepspeed")
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

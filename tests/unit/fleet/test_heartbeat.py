"""What a node's agent writes of the node: its processors, its memory and its GPUs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launcher.fleet import heartbeat
from launcher.fleet.cgroup import ControlGroup, Memory
from launcher.fleet.heartbeat import Heartbeat, _Gpus
from tests.time_limit import TIME_LIMIT_SECONDS

GIB = 1024**3


def group(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("_", ".", 1)).write_text(text + "\n")
    return root


def own(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_the_lowest_bound_of_the_groups_above_counts_without_what_can_be_reclaimed(tmp_path: Path) -> None:
    mounts = tmp_path / "fs"
    group(mounts / "job_7", memory_max=str(2 * GIB), memory_current=str(GIB), memory_stat=f"inactive_file {GIB // 4}")
    group(mounts / "job_7/step_0", memory_max="max", memory_current="5")
    group(mounts / "job_7/step_0/task_0", memory_max="max", memory_events="low 0\noom 3\noom_kill 2\n")
    found = ControlGroup(own(tmp_path, "0::/job_7/step_0/task_0"), mounts)
    assert found.memory() == Memory(used_bytes=GIB * 3 // 4, total_bytes=2 * GIB)
    assert found.oom_kills() == 2


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    mounts = tmp_path / "fs"
    stat = f"inactive_file 1\ntotal_inactive_file {GIB // 2}"
    files = {"memory_limit_in_bytes": str(GIB), "memory_usage_in_bytes": str(GIB), "memory_stat": stat}
    group(mounts / "memory/slurm/job_7", **files, memory_oom_control="under_oom 0\noom_kill 1")
    found = ControlGroup(own(tmp_path, "9:name=systemd:/", "4:cpu,memory:/slurm/job_7", "0::/"), mounts)
    assert found.memory() == Memory(used_bytes=GIB // 2, total_bytes=GIB)
    assert found.oom_kills() == 1


def test_a_container_may_not_see_where_its_group_lies(tmp_path: Path) -> None:
    mounts = group(tmp_path / "fs", memory_max=str(GIB), memory_current="1", memory_events="oom_kill 0")
    found = ControlGroup(own(tmp_path, "0::/docker/5f0c"), mounts)
    assert found.memory() == Memory(1, GIB)
    assert found.oom_kills() == 0


@pytest.mark.parametrize("lines", [(), ("0::/nowhere",), ("0::/",), ("damaged",)])
def test_without_a_bound_the_machine_s_memory_counts(tmp_path: Path, lines: tuple[str, ...]) -> None:
    (tmp_path / "fs").mkdir()
    found = ControlGroup(own(tmp_path, *lines), tmp_path / "fs")
    assert found.memory().total_bytes == psutil.virtual_memory().total
    assert found.oom_kills() is None
    # A bound beyond what there is bounds nothing.
    group(tmp_path / "fs", memory_max=str(2**63 - 4096), memory_current="1")
    assert ControlGroup(own(tmp_path, "0::/"), tmp_path / "fs").memory().total_bytes == psutil.virtual_memory().total


def written(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "node.json").read_text())
    return record


def test_the_use_of_processors_is_that_of_the_time_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_FIRST_SECONDS", 0.3)
    file = group(tmp_path / "fs", memory_max=str(GIB), memory_current="1", memory_events="oom_kill 4") / "memory.events"
    monkeypatch.setattr(heartbeat, "ControlGroup", lambda: ControlGroup(own(tmp_path, "0::/"), tmp_path / "fs"))
    pulse = Heartbeat(tmp_path, {"host": "h0"})
    pulse.begin([])
    busy_until((tmp_path / "node.json").exists)
    first = written(tmp_path)
    assert first["cpu_percent"] > 0 and not first["ended"]
    assert (first["memory_bytes"], first["oom_kills"]) == (GIB, 0)
    file.write_text("oom_kill 6\n")
    beginning = time.process_time()
    busy_until(lambda: time.process_time() - beginning > 0.3)
    pulse.end()
    last = written(tmp_path)
    assert last["cpu_percent"] > 0 and last["ended"]
    assert last["oom_kills"] == 2
    # A second end, and that of one which never began, do nothing.
    pulse.end()
    assert written(tmp_path) == last
    Heartbeat(tmp_path, {}).end()


def busy_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline


class NVMLError(Exception):
    """As pynvml has it."""


def nvml(**calls: Callable[[str], Any]) -> SimpleNamespace:
    """pynvml for GPUs whose handles are their names; a call that is not given is not supported."""

    def unsupported(_: str) -> Any:
        raise NVMLError

    names = ("MemoryInfo", "Name", "UtilizationRates", "HandleByIndex", "HandleByUUID")
    found = {f"nvmlDeviceGet{name}": calls.get(name, unsupported) for name in names}
    return SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, **found)


def test_a_part_of_a_gpu_tells_what_it_can_and_one_that_is_gone_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MIG instance has a name and memory, and no use of its own; nvmlDeviceGetUtilizationRates refuses it."""

    def use(handle: str) -> Any:
        if handle.startswith("MIG"):
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=40)

    def by_uuid(name: str) -> str:
        if name == "GPU-lost":
            raise NVMLError("GPU is lost")
        return name

    module = nvml(
        MemoryInfo=lambda _: SimpleNamespace(used=3 * GIB, total=10 * GIB),
        Name=lambda handle: f"H100 {handle}",
        UtilizationRates=use,
        HandleByIndex=lambda index: f"GPU-{index}",
        HandleByUUID=by_uuid,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,GPU-lost,2")
    memory = {"memory_used_bytes": 3 * GIB, "memory_bytes": 10 * GIB}
    assert _Gpus().read() == [
        {"index": 0, "name": "H100 MIG-1", **memory, "utilization_percent": None},
        {"index": 2, "name": "H100 GPU-2", **memory, "utilization_percent": 40},
    ]
    # A driver that fails later on tells nothing more, and the GPUs stay.
    monkeypatch.setattr(module, "nvmlDeviceGetMemoryInfo", nvml().nvmlDeviceGetMemoryInfo)
    assert [gpu["memory_bytes"] for gpu in _Gpus().read()] == [None, None]

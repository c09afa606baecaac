"""The Ray of a Slurm job when it does not start."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from launcher.errors import RunFailed
from launcher.slurm.allocation import Allocation
from launcher.slurm.ray_node import RayNode


def test_a_ray_that_exits_at_once_is_started_again_and_then_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no libstdc++ here\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    log = io.BytesIO()
    ray = RayNode(Allocation("77", 0, 0, ("h1",), cpus=1, gpus=0), "127.0.0.1", None, log)
    with pytest.raises(RunFailed, match=r"Ray did not start on .* in 3 tries"):
        ray.start()
    ray.end()
    assert log.getvalue().decode().splitlines() == ["no libstdc++ here"] * 3

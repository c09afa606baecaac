"""Names of Ray that are not documented: what happens once one of them is gone."""

from __future__ import annotations

import sys

import pytest
from ray.job_config import JobConfig

from launcher.errors import RunFailed
from launcher.fleet.nodes import Needs, Nodes
from launcher.fleet.ray_settings import job_config


def test_this_processs_folder_is_not_on_the_path_of_agents() -> None:
    config = job_config()
    config._py_driver_sys_path.append("/here")
    assert list(config._get_proto_job_config().py_driver_sys_path) == []


def test_a_ray_that_sets_the_path_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(JobConfig, "_get_proto_job_config")
    with pytest.raises(RunFailed, match=r"Ray [0-9.]+ is not supported: it sets the import path"):
        job_config()


def test_a_ray_that_does_not_report_what_is_free_leaves_that_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.state", None)
    told = Nodes(Needs(nodes=2, cpus=8, gpus=0), print)._missing()
    assert told.startswith("asked for 2 nodes with 8 CPU each; Ray ")
    assert told.endswith(" does not report what is free on each node")

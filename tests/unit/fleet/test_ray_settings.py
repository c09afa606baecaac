"""Undocumented names of Ray: what happens if one is missing."""

from __future__ import annotations

import sys

import pytest
from ray.job_config import JobConfig

from launcher.errors import RunFailed
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.placement import missing_nodes
from launcher.fleet.ray_settings import job_config


def test_the_folder_of_this_process_is_not_on_the_import_path_of_agents() -> None:
    config = job_config()
    config._py_driver_sys_path.append("/here")
    assert list(config._get_proto_job_config().py_driver_sys_path) == []


def test_a_ray_that_sets_the_path_in_an_unknown_way_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(JobConfig, "_get_proto_job_config")
    with pytest.raises(RunFailed, match=r"Ray [0-9.]+ is not supported: it sets the import path"):
        job_config()


def test_without_free_resources_from_ray_only_the_request_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.state", None)
    text = missing_nodes(NodeResources(nodes=2, cpus=8, gpus=0))
    assert text.startswith("asked for 2 nodes with 8 CPU each; Ray ")
    assert text.endswith(" does not report what is free on each node")

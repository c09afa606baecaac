"""Which nodes of an allocation are excluded from a run; tests/cluster/test_spare_nodes.py requeues a real job."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.slurm.requeue import excluded_of, requeue_without, slurm_names


@pytest.mark.parametrize(
    ("excluded", "found"),
    [
        ([], []),
        (["gpu02"], ["gpu02"]),
        # A node may report its full name, and Slurm knows the short one.
        (["gpu02.cluster.example.org", "gpu04"], ["gpu02"]),
        (["gpu0"], []),
        (["gpu03", "gpu01"], ["gpu01", "gpu03"]),
    ],
)
def test_excluded_nodes_of_an_allocation(excluded: list[str], found: list[str]) -> None:
    assert excluded_of(("gpu01", "gpu02", "gpu03"), excluded) == found


def test_only_names_of_hosts_reach_slurm() -> None:
    """node_failures.json may have been edited or damaged."""
    assert slurm_names(["gpu01", "gpu02 --nice", "$(rm x)", "-x", "", "gpu03,gpu04", "gpu05.example.org"]) == [
        "gpu01",
        "gpu05",
    ]


def test_without_slurm_the_reason_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = requeue_without("77", ["gpu01"])
    assert refused is not None and "scontrol" in refused

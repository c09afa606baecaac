"""Which measured values make a check fail, and for which node and device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.fleet.gpu_state import FATAL_XIDS, GpuState, Xid
from launcher.fleet.health import RECENT_SECONDS, FailedCheck, Matmul, NodeHealth, judge, speed_text

GIB = 1024**3
GPU = GpuState(
    index=3,
    uuid="GPU-1",
    name="NVIDIA H200",
    bus="00000000:3b:00.0",
    memory_bytes=140 * GIB,
    free_bytes=139 * GIB,
    uncorrected_errors=0,
    corrected_errors=12,
    remap_pending=False,
    remap_failed=False,
    throttle_reasons=1,
    pcie_width=16,
    pcie_max_width=16,
)


def of_one_node(**values: Any) -> list[FailedCheck]:
    (found,) = judge([NodeHealth(**values)])
    return found


def with_gpu(**changes: Any) -> list[FailedCheck]:
    return of_one_node(gpus=[replace(GPU, **changes)])


def test_healthy_nodes_fail_nothing() -> None:
    matmuls = [Matmul(f"GPU {k}", "H200", tflops=700.0 + k) for k in range(8)]
    healthy = NodeHealth(2e9, [GPU], [], matmuls, {1: 20e9}, 21e9)
    assert judge([healthy, healthy]) == [[], []]
    assert judge([NodeHealth()]) == [[]], "nothing was measured"
    assert judge([]) == []


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"uncorrected_errors": 2}, "ecc", "GPU 3 has 2 uncorrected memory errors"),
        ({"remap_failed": True}, "ecc", "GPU 3 has a memory row that could not be remapped"),
        ({"needs_reset": True}, "reset", "GPU 3 requires a reset"),
    ],
)
def test_hardware_errors_refuse_the_node(changes: dict[str, Any], check: str, words: str) -> None:
    (found,) = with_gpu(**changes)
    assert (found.check, found.refuses, found.device) == (check, True, "GPU 3")
    assert found.text.startswith(words)


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"remap_pending": True}, "ecc", "GPU 3 needs a reset"),
        ({"throttle_reasons": 0x40}, "throttle", "GPU 3 lowers its clocks (too hot (hardware slowdown))"),
        ({"free_bytes": 100 * GIB}, "memory", "GPU 3 has 100.0 of 140.0 GiB free"),
        ({"pcie_width": 4}, "pcie", "GPU 3 has 4 of 16 PCIe lanes"),
    ],
)
def test_what_makes_a_gpu_slow_only_warns(changes: dict[str, Any], check: str, words: str) -> None:
    (found,) = with_gpu(**changes)
    assert (found.check, found.refuses, found.device) == (check, False, "GPU 3")
    assert found.text.startswith(words)


def test_what_is_unknown_or_usual_is_not_a_fault() -> None:
    names = ("free_bytes", "memory_bytes", "uncorrected_errors", "remap_pending", "remap_failed")
    assert with_gpu(**dict.fromkeys((*names, "throttle_reasons", "pcie_width", "pcie_max_width"))) == []
    assert with_gpu(throttle_reasons=0x4, free_bytes=127 * GIB, corrected_errors=5000) == []
    assert with_gpu(pcie_width=8) == [], "half of the lanes, as in many workstations"


def test_a_gpu_with_fewer_lanes_than_the_others_is_named() -> None:
    narrow = replace(GPU, index=5, pcie_width=8)
    first, second = judge([NodeHealth(gpus=[GPU, GPU, narrow]), NodeHealth(gpus=[GPU])])
    assert [(each.check, each.device) for each in first] == [("pcie", "GPU 5")]
    assert second == []
    assert judge([NodeHealth(gpus=[narrow, narrow])]) == [[]], "all have as many"


@pytest.mark.parametrize("number", [*FATAL_XIDS, 13, 31, 43, 63, 94])
@pytest.mark.parametrize("age", [60.0, RECENT_SECONDS + 1, None])
def test_recent_xids_of_broken_hardware_refuse_the_node(number: int, age: float | None) -> None:
    found = of_one_node(gpus=[GPU], xids=[Xid(number, "0000:3b:00", age, "")])
    if age == 60.0 and number in FATAL_XIDS:
        assert [(each.check, each.refuses, each.device) for each in found] == [("xid", True, "GPU 3")]
        assert f"Xid {number} 1 min ago" in found[0].text
    else:
        assert found == []


def test_the_xids_of_gpus_that_the_run_does_not_use_do_not_count() -> None:
    assert of_one_node(gpus=[GPU], xids=[Xid(79, "0000:19:00", 60.0, "")]) == []


def test_a_wrong_product_refuses_the_node_and_names_the_device() -> None:
    good, bad = Matmul("GPU 0", "H200", 700.0), Matmul("GPU 5", "H200", 700.0, wrong=3)
    first, second = judge([NodeHealth(matmuls=[good, good]), NodeHealth(matmuls=[good, bad])])
    assert first == []
    (found,) = second
    assert (found.check, found.refuses, found.device) == ("matmul", True, "GPU 5")
    assert "GPU 5 multiplies wrongly (wrong elements of a known product: 3)" in found.text


def test_a_device_that_cannot_multiply_refuses_the_node_and_has_no_speed() -> None:
    broken = Matmul("GPU 1", "H200", error="CUDA error: unspecified launch failure")
    health = NodeHealth(matmuls=[Matmul("GPU 0", "H200", 700.0), broken])
    (found,) = judge([health])[0]
    assert found.refuses and "CUDA error: unspecified launch failure" in found.text
    assert health.tflops == 700.0


@pytest.mark.parametrize(("tflops", "slow"), [(598.0, False), (594.0, True), (0.0, True)])
def test_a_slow_gpu_is_named_with_figures(tflops: float, slow: bool) -> None:
    healths = [NodeHealth(matmuls=[Matmul(f"GPU {k}", "H200", 700.0) for k in range(4)]) for _ in range(2)]
    healths[1].matmuls[2] = Matmul("GPU 2", "H200", tflops)
    first, second = judge(healths)
    assert first == []
    assert [(each.check, each.device, each.refuses) for each in second] == (
        [("tflops", "GPU 2", False)] if slow else []
    )
    if tflops == 594.0:
        assert second[0].text.startswith("GPU 2 multiplies at 594 TFLOP/s, 85% of the median 700")


def test_devices_are_compared_with_those_of_the_same_name() -> None:
    mixed = [Matmul("GPU 0", "A100", 250.0), Matmul("GPU 1", "H200", 700.0), Matmul("GPU 2", "H200", 690.0)]
    assert of_one_node(matmuls=mixed) == []


@pytest.mark.parametrize(("tflops", "slow"), [(0.04, False), (0.03, True)])
def test_the_speed_of_cpus_may_vary_more(tflops: float, slow: bool) -> None:
    values = (0.1, tflops, 0.1)
    found = judge([NodeHealth(matmuls=[Matmul("CPU", "CPU", value)]) for value in values])
    assert [bool(each) for each in found] == [False, slow, False]


def ring(*slow: int, nodes: int) -> list[NodeHealth]:
    """Nodes on a ring, with slow links at some of them."""
    return [
        NodeHealth(
            links={
                peer: 1e8 if node in slow or peer in slow else 1e10 for peer in ((node - 1) % nodes, (node + 1) % nodes)
            }
        )
        for node in range(nodes)
    ]


@pytest.mark.parametrize(("nodes", "slow"), [(3, [1]), (3, [0]), (4, [2]), (6, [2, 3]), (8, [7]), (8, [])])
def test_a_node_whose_links_are_all_slow_is_named_and_its_neighbours_are_not(nodes: int, slow: list[int]) -> None:
    found = judge(ring(*slow, nodes=nodes))
    assert [rank for rank, failed in enumerate(found) if failed] == slow
    for rank in slow:
        (failed,) = found[rank]
        assert (failed.check, failed.refuses) == ("bandwidth", False)
        assert "100 MB/s, 1% of the median 10 GB/s" in failed.text


def test_one_link_between_two_nodes_names_neither() -> None:
    assert judge(ring(1, nodes=2)) == [[], []]


def test_a_slow_disk_is_named_beside_others_and_by_itself() -> None:
    speeds = (2e9, 0.5e9, 2e9, None)
    found = judge([NodeHealth(disk_bytes_per_second=speed) for speed in speeds])
    assert [len(each) for each in found] == [0, 1, 0, 0]
    assert found[1][0].text.startswith("it writes 500 MB/s to the run directory, 25% of the median 2 GB/s")
    (alone,) = of_one_node(disk_bytes_per_second=5e6)
    assert (alone.check, alone.refuses) == ("disk", False) and "it writes 5 MB/s" in alone.text
    both = judge([NodeHealth(disk_bytes_per_second=speed) for speed in (5e6, 2e9, 2e9)])
    assert [len(each) for each in both] == [1, 0, 0]


def test_speeds_in_text() -> None:
    assert [speed_text(speed) for speed in (5e5, 8.04e7, 1.25e9, 4e10)] == [
        "0.5 MB/s",
        "80.4 MB/s",
        "1.25 GB/s",
        "40 GB/s",
    ]

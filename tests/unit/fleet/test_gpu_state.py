"""What nvidia-smi and the kernel log report about GPUs, in the forms that they have on different cards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launcher.fleet.gpu_state import (
    FIELDS,
    GpuState,
    is_assigned,
    parse_gpus,
    parse_xids,
    read_gpus,
    same_bus,
    throttle_faults,
)

MIB = 1024**2
H200 = (
    "0, GPU-1f6a9d9b-0001-4c5e-8f67-00aa11bb22cc, NVIDIA H200, 00000000:19:00.0, 143771, 143156, "
    "0, 0, No, No, 0x0000000000000001, 16, 16"
)
A100 = (
    "3, GPU-2c7e8f10-0002-4c5e-8f67-00aa11bb22cc, NVIDIA A100-SXM4-80GB, 00000000:87:00.0, 81920, 81037, "
    "2, 17, Yes, No, 0x0000000000000040, 8, 16"
)
CONSUMER = (
    "0, GPU-3d8f9021-0003-4c5e-8f67-00aa11bb22cc, NVIDIA GeForce RTX 4090, 00000000:01:00.0, 24564, 23028, "
    "[N/A], [N/A], [N/A], [N/A], 0x0000000000000004, 8, 16"
)
NEEDS_RESET = (
    "1, GPU-4e9fa132-0004-4c5e-8f67-00aa11bb22cc, NVIDIA H100 80GB HBM3, 00000000:3B:00.0, [GPU requires reset], "
    "[GPU requires reset], [GPU requires reset], [GPU requires reset], [GPU requires reset], [GPU requires reset], "
    "[GPU requires reset], [GPU requires reset], [GPU requires reset]"
)


def test_a_healthy_gpu_of_a_data_centre() -> None:
    assert parse_gpus(H200) == [
        GpuState(
            index=0,
            uuid="GPU-1f6a9d9b-0001-4c5e-8f67-00aa11bb22cc",
            name="NVIDIA H200",
            bus="00000000:19:00.0",
            memory_bytes=143771 * MIB,
            free_bytes=143156 * MIB,
            uncorrected_errors=0,
            corrected_errors=0,
            remap_pending=False,
            remap_failed=False,
            throttle_reasons=1,
            pcie_width=16,
            pcie_max_width=16,
        )
    ]


def test_memory_errors_a_pending_remap_heat_and_missing_lanes() -> None:
    (found,) = parse_gpus(A100)
    assert (found.uncorrected_errors, found.corrected_errors) == (2, 17)
    assert (found.remap_pending, found.remap_failed) == (True, False)
    assert (found.pcie_width, found.pcie_max_width) == (8, 16)
    assert throttle_faults(found.throttle_reasons) == ["too hot (hardware slowdown)"]


@pytest.mark.parametrize("absent", ["[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "ERR!", ""])
def test_what_a_card_does_not_report_is_unknown_and_not_a_fault(absent: str) -> None:
    (found,) = parse_gpus(CONSUMER.replace("[N/A]", absent))
    unknown = (found.uncorrected_errors, found.corrected_errors, found.remap_pending, found.remap_failed)
    assert unknown == (None,) * 4 and not found.needs_reset
    assert (found.pcie_width, found.free_bytes) == (8, 23028 * MIB)


def test_a_gpu_that_requires_a_reset() -> None:
    (found,) = parse_gpus(NEEDS_RESET)
    assert found.needs_reset and found.name == "NVIDIA H100 80GB HBM3" and found.memory_bytes is None


@pytest.mark.parametrize(
    ("reasons", "faults"),
    [
        (0x0, 0),
        (0x1, 0),  # idle
        (0x2, 0),  # clocks set by the user
        (0x4, 0),  # the power limit, under full load
        (0x5, 0),
        (0x100, 0),  # clocks set for a display
        (None, 0),
        (0x8, 1),
        (0x20, 1),
        (0x80, 1),
        (0x1 | 0x8 | 0x40, 2),
    ],
)
def test_idle_and_the_power_limit_are_not_faults(reasons: int | None, faults: int) -> None:
    assert len(throttle_faults(reasons)) == faults


class NvidiaSmi:
    """An nvidia-smi that knows some fields, and refuses a query with any other as the real one does."""

    def __init__(self, rows: Sequence[str], unknown: Sequence[str] = (), newer: Sequence[str] = ()) -> None:
        self.rows = [dict(zip(FIELDS, row.split(", "), strict=True)) for row in rows]
        self.unknown, self.newer = unknown, newer

    def __call__(self, command: Sequence[str]) -> tuple[int | str, str]:
        program, query, form = command
        assert (program, form) == ("nvidia-smi", "--format=csv,noheader,nounits")
        fields = query.removeprefix("--query-gpu=").split(",")
        for name in fields:
            if name in self.unknown or (name not in FIELDS and name not in self.newer):
                return 2, f'Field "{name}" is not a valid field to query.\n'
        old = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
        return 0, "".join(f"{', '.join(row[old.get(name, name)] for name in fields)}\n" for row in self.rows)


def test_assigned_gpus_by_number_or_uuid() -> None:
    run = NvidiaSmi([H200, A100])
    both, reason = read_gpus(run, [])
    assert ([gpu.index for gpu in both], reason) == ([0, 3], None)
    for assigned in (["3"], ["GPU-2c7e8f10"], ["7", "3"]):
        (found,), reason = read_gpus(run, assigned)
        assert (found.index, reason) == (3, None)
    assert read_gpus(run, ["MIG-2c7e8f10"]) == ([], None)
    assert not is_assigned(both[0], ["30"])


def test_fields_that_a_driver_does_not_have_are_left_out() -> None:
    old = NvidiaSmi([A100], unknown=["remapped_rows.pending", "remapped_rows.failure"])
    (found,), reason = read_gpus(old, [])
    assert (reason, found.remap_pending, found.uncorrected_errors, found.pcie_width) == (None, None, 2, 8)
    assert throttle_faults(found.throttle_reasons) == ["too hot (hardware slowdown)"]


def test_throttle_reasons_under_their_newer_name() -> None:
    newer = NvidiaSmi([A100], unknown=["clocks_throttle_reasons.active"], newer=["clocks_event_reasons.active"])
    (found,), _ = read_gpus(newer, [])
    assert found.throttle_reasons == 0x40
    neither = NvidiaSmi([A100], unknown=["clocks_throttle_reasons.active"])
    (found,), reason = read_gpus(neither, [])
    assert (found.throttle_reasons, found.pcie_width, reason) == (None, 8, None)


def test_a_lost_gpu_and_a_missing_program_are_reported() -> None:
    lost = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error"
    found, reason = read_gpus(lambda _: (255, f"{H200}\n{lost}\n"), [])
    assert ([gpu.index for gpu in found], reason) == ([0], f"nvidia-smi ended with 255: {lost}")
    absent = "nvidia-smi: No such file or directory"
    assert read_gpus(lambda _: (absent, ""), []) == ([], absent)


KERNEL_LOG = """\
[    0.000000] Linux version 6.1.0
[  100.500000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.54.15
[ 7000.250000] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
<3>[ 9000.000000] NVRM: Xid (PCI:0000:19:00): 13, pid=4711, name=python, Graphics Exception
NVRM: Xid (PCI:0000:19:00): 48, pid=1, An uncorrectable double bit error
[ 9100.000000] NVRM: GPU at PCI:0000:19:00: GPU-1f6a9d9b
"""


def test_xid_errors_of_the_kernel_log_with_their_age() -> None:
    found = parse_xids(KERNEL_LOG, uptime_seconds=10_000.25)
    assert [(xid.number, xid.bus, xid.age_seconds) for xid in found] == [
        (79, "0000:3b:00", 3000.0),
        (13, "0000:19:00", 1000.25),
        (48, "0000:19:00", None),
    ]
    assert found[0].text.endswith("GPU has fallen off the bus.")


def test_addresses_of_the_same_device() -> None:
    assert same_bus("00000000:3B:00.0", "0000:3b:00")
    assert not same_bus("00000000:3B:00.0", "0000:3c:00")
    assert not same_bus("00010000:3B:00.0", "0000:3b:00")
    assert not same_bus("", "0000:3b:00")

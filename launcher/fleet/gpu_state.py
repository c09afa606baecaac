"""The state of a node's GPUs: what nvidia-smi and the kernel log report about them, as data.

The fields of nvidia-smi: `nvidia-smi --help-query-gpu`. Xid numbers: NVIDIA's "GPU Deployment and Management
Documentation", XID Errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Run = Callable[[Sequence[str]], tuple[int | str, str]]
"""Runs a command: its exit status, or a message if it could not run, and its output."""

FIELDS = (
    "index",
    "uuid",
    "name",
    "pci.bus_id",
    "memory.total",
    "memory.free",
    "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.corrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks_throttle_reasons.active",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
_NEWER_NAMES = {"clocks_throttle_reasons.active": "clocks_event_reasons.active"}
_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
_XID = re.compile(r"^(?:<\d+>)?(?:\[\s*(\d+\.\d+)\])?.*NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+),?\s*(.*)$")
_BUS = re.compile(r"([0-9a-f]+):([0-9a-f]{2}):([0-9a-f]{2})")
_MIB = 1024**2

THROTTLE_FAULTS = {
    0x08: "hardware slowdown",
    0x20: "too hot (software slowdown)",
    0x40: "too hot (hardware slowdown)",
    0x80: "power brake",
}
"""Bits of the throttle reasons that mean a fault. Others, such as idle (0x1) and the power limit (0x4), are normal."""
FATAL_XIDS = {
    48: "an uncorrectable memory error",
    62: "its internal controller halted",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "it was lost from the PCIe bus",
    95: "an uncontained memory error",
    119: "its firmware does not answer",
    120: "its firmware failed",
    140: "an unrecovered memory error",
}
"""Xids of broken hardware. The others, such as 13, 31 and 43, are mostly errors of programs."""


@dataclass(frozen=True)
class GpuState:
    """One GPU; what nvidia-smi does not report is None. `throttle_reasons` are bits.

    Errors are counted since the last reset.
    """

    index: int
    uuid: str
    name: str
    bus: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    uncorrected_errors: int | None = None
    corrected_errors: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    throttle_reasons: int | None = None
    pcie_width: int | None = None
    pcie_max_width: int | None = None
    needs_reset: bool = False


@dataclass(frozen=True)
class Xid:
    """An Xid error in the kernel log; `age_seconds` is None if its line has no time."""

    number: int
    bus: str
    age_seconds: float | None
    text: str


def read_gpus(run: Run, assigned: Sequence[str]) -> tuple[list[GpuState], str | None]:
    """The assigned GPUs (numbers or UUIDs; all if empty), and why they could not be read, or None.

    A field that this nvidia-smi does not have is left out.
    """
    fields = list(FIELDS)
    while True:
        code, output = run(("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"))
        unknown = _UNKNOWN_FIELD.search(output)
        if unknown is None or unknown[1] not in fields:
            break
        place, newer = fields.index(unknown[1]), _NEWER_NAMES.get(unknown[1])
        fields[place : place + 1] = [newer] if newer else []
    states = parse_gpus(output, fields)
    reason = None
    if code != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        reason = code if isinstance(code, str) else f"nvidia-smi ended with {code}: {lines[-1] if lines else ''}"
    return [state for state in states if is_assigned(state, assigned)], reason


def parse_gpus(output: str, fields: Sequence[str] = FIELDS) -> list[GpuState]:
    """The GPUs in the output of nvidia-smi for these fields. Other lines are skipped."""
    found = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields) or not values[0].isdigit():
            continue
        row = dict(zip(fields, values, strict=True))
        reasons = row.get("clocks_throttle_reasons.active", row.get("clocks_event_reasons.active", ""))
        found.append(
            GpuState(
                index=int(row["index"]),
                uuid=row.get("uuid", ""),
                name=row.get("name", ""),
                bus=row.get("pci.bus_id", "").lower(),
                memory_bytes=_mebibytes(row.get("memory.total", "")),
                free_bytes=_mebibytes(row.get("memory.free", "")),
                uncorrected_errors=_whole(row.get("ecc.errors.uncorrected.volatile.total", "")),
                corrected_errors=_whole(row.get("ecc.errors.corrected.volatile.total", "")),
                remap_pending=_flag(row.get("remapped_rows.pending", "")),
                remap_failed=_flag(row.get("remapped_rows.failure", "")),
                throttle_reasons=_bits(reasons),
                pcie_width=_whole(row.get("pcie.link.width.current", "")),
                pcie_max_width=_whole(row.get("pcie.link.width.max", "")),
                needs_reset=any("requires reset" in value.lower() for value in values),
            )
        )
    return found


def is_assigned(state: GpuState, assigned: Sequence[str]) -> bool:
    """Whether the GPU is one of those assigned, which are numbers or beginnings of UUIDs; an empty list means all."""
    if not assigned:
        return True
    return any(name == str(state.index) if name.isdigit() else state.uuid.startswith(name) for name in assigned)


def parse_xids(kernel_log: str, uptime_seconds: float) -> list[Xid]:
    """The Xid errors in the output of dmesg, oldest first."""
    found = []
    for line in kernel_log.splitlines():
        if (match := _XID.match(line.strip())) is not None:
            age = None if match[1] is None else max(0.0, uptime_seconds - float(match[1]))
            found.append(Xid(int(match[3]), match[2].lower(), age, match[4].strip()))
    return found


def same_bus(one: str, other: str) -> bool:
    """Whether two PCI addresses, such as 00000000:3B:00.0 and 0000:3b:00, are of the same device."""
    first, second = _BUS.search(one.lower()), _BUS.search(other.lower())
    if first is None or second is None:
        return False
    return int(first[1], 16) == int(second[1], 16) and first.groups()[1:] == second.groups()[1:]


def throttle_faults(reasons: int | None) -> list[str]:
    """The throttle reasons that mean a fault, in words."""
    return [text for bit, text in THROTTLE_FAULTS.items() if (reasons or 0) & bit]


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _mebibytes(text: str) -> int | None:
    number = _whole(text)
    return None if number is None else number * _MIB


def _flag(text: str) -> bool | None:
    return {"yes": True, "no": False, "1": True, "0": False}.get(text.lower())


def _bits(text: str) -> int | None:
    try:
        return int(text, 16)
    except ValueError:
        return None

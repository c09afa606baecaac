"""Judges the health of nodes from what was measured on them. Pure.

A check that fails either refuses its node, since a run on it would compute wrongly or crash, or warns of a slow node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from launcher.fleet.gpu_state import FATAL_XIDS, GpuState, Xid, same_bus, throttle_faults

SLOW_GPU = 0.85
"""TFLOP/s, as a fraction of the median of the run's devices with the same name."""
SLOW_CPU = 1 / 3
"""As `SLOW_GPU`. Other programs use CPUs too, so their speed varies more."""
SLOW_NETWORK = 0.5
"""Bandwidth of a node's better link, as a fraction of the median of all nodes."""
SLOW_DISK = 1 / 3
"""Write speed, as a fraction of the median of all nodes. All nodes write at the same time, and share the storage."""
LEAST_DISK = 20e6
"""Bytes per second below which a run directory is slow, also if it is equally slow from all nodes."""
LEAST_FREE = 0.9
"""The free fraction of a GPU's memory before a run starts."""
RECENT_SECONDS = 3600.0
"""An older Xid error does not refuse a node: the GPU may have been reset since then."""
_LEAST_WIDTH = 0.5
"""PCIe lanes of a GPU, as a fraction of what it can have. A slot with half of the lanes is common in workstations."""
_GIB = 1024**3


@dataclass(frozen=True)
class Matmul:
    """The result of multiplying matrices with a known product on one device ("GPU 3", "CPU").

    `name` is the device's model. `wrong` is the number of wrong elements. `error`: why it could not be computed.
    """

    device: str
    name: str
    tflops: float = 0.0
    wrong: int = 0
    error: str | None = None


@dataclass
class NodeHealth:
    """What was measured on one node; None or empty if it was not.

    `links` are the bandwidths to other nodes, by node rank, and `ring_bytes_per_second` is that of an all-reduce of all
    nodes: bus bandwidths, 2 (n - 1) / n times the bytes per second. `unknown`: what could not be measured, and why.
    """

    disk_bytes_per_second: float | None = None
    gpus: list[GpuState] = field(default_factory=list)
    xids: list[Xid] = field(default_factory=list)
    matmuls: list[Matmul] = field(default_factory=list)
    links: dict[int, float] = field(default_factory=dict)
    ring_bytes_per_second: float | None = None
    unknown: list[str] = field(default_factory=list)

    @property
    def network_bytes_per_second(self) -> float | None:
        """The bandwidth of the node's better link: a slow node makes a link of each of its neighbours slow."""
        return max(self.links.values(), default=None)

    @property
    def tflops(self) -> float | None:
        """TFLOP/s of the slowest device."""
        return min((each.tflops for each in self.matmuls if each.error is None), default=None)


@dataclass(frozen=True)
class FailedCheck:
    """A failed check of a node, or of one of its devices. `refuses`: a run must not start on this node."""

    check: str
    text: str
    refuses: bool = False
    device: str | None = None


def judge(healths: Sequence[NodeHealth]) -> list[list[FailedCheck]]:
    """The failed checks of each node, in the order of nodes."""
    found = [[*_faults(health), *_warnings(health)] for health in healths]
    for compared in (_slow_devices(healths), _narrow_gpus(healths), _slow_links(healths), _slow_disks(healths)):
        for checks, further in zip(found, compared, strict=True):
            checks += further
    return found


def _faults(health: NodeHealth) -> list[FailedCheck]:
    """The checks that refuse the node."""
    found: list[FailedCheck] = []

    def refuse(check: str, device: str, what: str, hint: str) -> None:
        found.append(FailedCheck(check, f"{device} {what}: {hint}", True, device))

    for each in health.matmuls:
        if each.error is not None:
            refuse("matmul", each.device, f"cannot multiply matrices ({each.error})", "check nvidia-smi and dmesg")
        elif each.wrong:
            what = f"multiplies wrongly (wrong elements of a known product: {each.wrong})"
            refuse("matmul", each.device, what, "do not train on it; it needs a repair")
    for gpu in health.gpus:
        device = f"GPU {gpu.index}"
        if gpu.needs_reset:
            refuse("reset", device, "requires a reset, as nvidia-smi reports", "nvidia-smi --gpu-reset, or reboot")
        if gpu.uncorrected_errors:
            what = f"has {gpu.uncorrected_errors} uncorrected memory errors (ECC) since its last reset"
            refuse("ecc", device, what, "nvidia-smi --gpu-reset, or reboot; replace it if they return")
        if gpu.remap_failed:
            refuse("ecc", device, "has a memory row that could not be remapped", "replace it")
    for xid in health.xids:
        recent = xid.age_seconds is not None and xid.age_seconds <= RECENT_SECONDS
        place = next((gpu for gpu in health.gpus if same_bus(gpu.bus, xid.bus)), None)
        if recent and xid.number in FATAL_XIDS and place is not None:
            what = f"reported Xid {xid.number} {_minutes(xid.age_seconds)} ago ({FATAL_XIDS[xid.number]})"
            refuse("xid", f"GPU {place.index}", what, "reset it and clear the kernel log (dmesg --clear), or reboot")
    return found


def _warnings(health: NodeHealth) -> list[FailedCheck]:
    """The checks of one node that only warn."""
    found: list[FailedCheck] = []
    for gpu in health.gpus:
        device = f"GPU {gpu.index}"
        if gpu.remap_pending:
            found.append(FailedCheck("ecc", f"{device} needs a reset to replace a bad memory row", device=device))
        for reason in throttle_faults(gpu.throttle_reasons):
            text = f"{device} lowers its clocks ({reason}): check its cooling and power supply"
            found.append(FailedCheck("throttle", text, device=device))
        free, total = gpu.free_bytes, gpu.memory_bytes
        if free is not None and total and free < LEAST_FREE * total:
            text = f"{device} has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free: nvidia-smi shows who uses the rest"
            found.append(FailedCheck("memory", text, device=device))
    disk = health.disk_bytes_per_second
    if disk is not None and disk < LEAST_DISK:
        text = f"it writes {speed_text(disk)} to the run directory: checkpoints will take long"
        found.append(FailedCheck("disk", text))
    return found


def _slow_devices(healths: Sequence[NodeHealth]) -> list[list[FailedCheck]]:
    """Devices that are slow compared with the run's other devices of the same name."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for each in (each for health in healths for each in health.matmuls if each.error is None):
        speeds[each.name].append(each.tflops)
    usual = {name: median(values) for name, values in speeds.items()}
    found = []
    for health in healths:
        slow = [each for each in health.matmuls if each.error is None and _is_slow(each, usual[each.name])]
        found.append(
            [
                FailedCheck(
                    "tflops",
                    f"{each.device} multiplies at {each.tflops:.3g} TFLOP/s, {_percent(each.tflops, usual[each.name])} "
                    f"of the median {usual[each.name]:.3g}: every update waits for it",
                    device=each.device,
                )
                for each in slow
            ]
        )
    return found


def _is_slow(each: Matmul, usual: float) -> bool:
    return each.tflops < (SLOW_CPU if each.device == "CPU" else SLOW_GPU) * usual


def _narrow_gpus(healths: Sequence[NodeHealth]) -> list[list[FailedCheck]]:
    """GPUs with fewer PCIe lanes than most, or than half of what they can have."""
    widths = [gpu.pcie_width for health in healths for gpu in health.gpus if gpu.pcie_width]
    usual = median(widths) if widths else 0
    found: list[list[FailedCheck]] = []
    for health in healths:
        checks = []
        for gpu in health.gpus:
            width, most = gpu.pcie_width, gpu.pcie_max_width
            if width and most and width < most and (width < usual or width < _LEAST_WIDTH * most):
                device = f"GPU {gpu.index}"
                text = f"{device} has {width} of {most} PCIe lanes: transfers to and from it are slow; reseat it"
                checks.append(FailedCheck("pcie", text, device=device))
        found.append(checks)
    return found


def _slow_links(healths: Sequence[NodeHealth]) -> list[list[FailedCheck]]:
    values = [health.network_bytes_per_second for health in healths]
    text = "its better link has {speed}, {percent} of the median {usual}: every update waits for it"
    return _below_median("bandwidth", values, SLOW_NETWORK, text)


def _slow_disks(healths: Sequence[NodeHealth]) -> list[list[FailedCheck]]:
    # A node that is below the absolute limit is named already.
    values = [health.disk_bytes_per_second for health in healths]
    text = "it writes {speed} to the run directory, {percent} of the median {usual}: checkpoints wait for it"
    found = _below_median("disk", values, SLOW_DISK, text)
    return [[] if value is not None and value < LEAST_DISK else each for value, each in zip(values, found, strict=True)]


def _below_median(check: str, values: Sequence[float | None], fraction: float, text: str) -> list[list[FailedCheck]]:
    """A failed check for each node whose value is below a fraction of the median."""
    known = [value for value in values if value is not None]
    usual = median(known) if known else 0.0
    return [
        [
            FailedCheck(
                check, text.format(speed=speed_text(value), percent=_percent(value, usual), usual=speed_text(usual))
            )
        ]
        if value is not None and value < fraction * usual
        else []
        for value in values
    ]


def speed_text(bytes_per_second: float) -> str:
    """Bytes per second with a unit, such as "1.25 GB/s" or "80 MB/s"."""
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.3g} GB/s"
    return f"{bytes_per_second / 1e6:.3g} MB/s"


def _percent(value: float, usual: float) -> str:
    return f"{100 * value / usual:.0f}%"


def _minutes(seconds: float | None) -> str:
    return f"{(seconds or 0.0) / 60:.0f} min"

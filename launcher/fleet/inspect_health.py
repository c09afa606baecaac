"""Measures the health of one node: its GPUs' state, the write speed to the run directory, and the probe's figures."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.fleet.gpu_state import parse_xids, read_gpus
from launcher.fleet.health import Matmul, NodeHealth
from launcher.fleet.heartbeat import visible_gpus
from launcher.fleet.process import run_command

FIGURES = "LAUNCHER_FIGURES "
"""The start of a line of the probe that has figures, as JSON."""
_PROBE = ("-P", "-m", "launcher.worker.health_probe")
_COMMAND_SECONDS = 30.0
_MIB = 1024**2
_CHUNK_BYTES = 4 * _MIB
_DISK_BYTES, _DISK_BYTES_FULL = 16 * _MIB, 256 * _MIB
_DISK_SECONDS, _DISK_SECONDS_FULL = 0.5, 10.0


@dataclass(frozen=True)
class Probed:
    """What the probe of one node printed, and why it failed, or None."""

    error: str | None
    figures: list[dict[str, Any]] = field(default_factory=list)


def measure_health(run_dir: str, gpus: bool, full: bool) -> NodeHealth:
    """Writes a file to the run directory, which is removed, and reads the state of the GPUs if the run uses them."""
    health = NodeHealth()
    limits = (_DISK_BYTES_FULL, _DISK_SECONDS_FULL) if full else (_DISK_BYTES, _DISK_SECONDS)
    try:
        health.disk_bytes_per_second = write_speed(Path(run_dir), *limits)
    except OSError as error:
        health.unknown.append(
            f"the write speed to the run directory: {type(error).__name__}: {error.strerror or error}"
        )
    if gpus:
        _read_gpus(health)
    return health


def write_speed(folder: Path, most_bytes: int, most_seconds: float) -> float:
    """Bytes per second that reach the disk, from a file that is removed. Raises OSError.

    It writes chunks until it has written `most_bytes`, or one chunk ends after `most_seconds`.
    """
    path, chunk, written = folder / f".write-test-{secrets.token_hex(8)}", os.urandom(_CHUNK_BYTES), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        began = time.perf_counter()
        while written < most_bytes and time.perf_counter() - began < most_seconds:
            written += os.write(descriptor, chunk)
            os.fsync(descriptor)
        return written / (time.perf_counter() - began)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()


def _read_gpus(health: NodeHealth) -> None:
    health.gpus, reason = read_gpus(_run, visible_gpus())
    if reason is not None:
        health.unknown.append(f"the state of the GPUs: {reason}")
    # Most containers and many machines do not let users read the kernel log.
    code, log = _run(("dmesg",))
    if code == 0:
        health.xids = parse_xids(log, time.clock_gettime(time.CLOCK_BOOTTIME))


def _run(command: Sequence[str]) -> tuple[int | str, str]:
    try:
        return run_command(command, os.environ, _COMMAND_SECONDS)
    except OSError as error:
        return f"{command[0]}: {error.strerror or error}", ""


def run_probe(environment: Mapping[str, str], timeout_seconds: float) -> Probed:
    """Multiplies matrices on this node's devices, and tries the network together with the other nodes' probes."""
    code, output = run_command((sys.executable, *_PROBE), environment, timeout_seconds)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    figures = [json.loads(line.removeprefix(FIGURES)) for line in lines if line.startswith(FIGURES)]
    if code == 0:
        return Probed(None, figures)
    others = [line for line in lines if not line.startswith(FIGURES)]
    if isinstance(code, str) or not others:
        return Probed(code if isinstance(code, str) else f"exit status {code}", figures)
    return Probed(others[-1], figures)


def add_figures(health: NodeHealth, figures: Sequence[Mapping[str, Any]]) -> None:
    """Adds the figures that a probe printed to what is known about its node."""
    for line in figures:
        if "matmul" in line:
            health.matmuls.append(Matmul(**line["matmul"]))
        elif "link" in line:
            health.links[line["link"]] = line["bytes_per_second"]
        elif "ring" in line:
            health.ring_bytes_per_second = line["ring"]

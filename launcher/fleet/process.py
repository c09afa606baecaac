"""One rank as an ordinary process: its orders, reports, log and exit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Protocol

import psutil

from launcher.records import AgentReport, ExitReport, Order, parse_report
from launcher.run_dir import utc_now

OnReport = Callable[[AgentReport], None]
_LOG_GRACE_SECONDS = 3.0
_KILLED_SECONDS = 10.0
_LINE_END = re.compile(rb"[\r\n]+")


class Child(Protocol):
    """A process whose standard input and output are pipes, as subprocess.Popen describes one."""

    @property
    def pid(self) -> int: ...

    @property
    def stdin(self) -> IO[bytes] | None: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


StartChild = Callable[[Sequence[str], Mapping[str, str], Mapping[str, int]], Child]


def start_process(command: Sequence[str], environment: Mapping[str, str], fds: Mapping[str, int]) -> Child:
    """Starts a fresh process. Its variables that are named in `fds` have the numbers of these descriptors there."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, **{name: str(fd) for name, fd in fds.items()}},
        pass_fds=tuple(fds.values()),
        # Its own process group, to end the whole rank and to keep a terminal's Ctrl-C from it.
        start_new_session=True,
    )


class RankProcess:
    """A started rank. `on_report` is called, from other threads, for each of its reports and last for its exit."""

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        on_report: OnReport,
        *,
        fds: Mapping[str, int] = MappingProxyType({}),
        start: StartChild = start_process,
    ) -> None:
        """Starts the rank with further descriptors, whose numbers are in the variables that `fds` names.

        Raises OSError if the log cannot be opened.
        """
        self.rank = rank
        self._on_report = on_report
        self._lock = threading.Lock()
        log_file = log.open("ab", buffering=0)
        report_in, report_out = os.pipe()
        try:
            self._process = start(command, environment, {"LAUNCHER_REPORT_FD": report_out, **fds})
        except BaseException:
            os.close(report_in)
            log_file.close()
            raise
        finally:
            os.close(report_out)
        assert self._process.stdout is not None
        readers = (
            threading.Thread(target=_copy_lines, args=(self._process.stdout, log_file), daemon=True),
            threading.Thread(target=self._read_reports, args=(os.fdopen(report_in, "rb"),), daemon=True),
        )
        for reader in readers:
            reader.start()
        threading.Thread(target=self._wait, args=(readers,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def order(self, order: Order) -> None:
        """Sends the rank an order; does nothing if it has ended."""
        stdin = self._process.stdin
        assert stdin is not None
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()

    def send_signal(self, number: int) -> None:
        """Signals the rank's whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait(self, timeout_seconds: float) -> bool:
        """Waits for the end of the rank. Returns whether it ended within the time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_seconds)
        return not self.alive()

    def _read_reports(self, reports: IO[bytes]) -> None:
        with reports:
            for line in reports:
                if (report := parse_report(line)) is not None:
                    report["rank"] = self.rank
                    self._on_report(report)

    def _wait(self, readers: Sequence[threading.Thread]) -> None:
        code = self._process.wait()
        ended = time.time()
        # The rank's child processes must not outlive it. Their end closes the pipes and completes the log.
        self.send_signal(signal.SIGKILL)
        for reader in readers:
            reader.join(_LOG_GRACE_SECONDS)
        self._on_report(ExitReport(report="exit", rank=self.rank, code=code, time=ended))


def run_command(
    command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float
) -> tuple[int | str, str]:
    """Runs a short command. Returns its exit status, or a message if it did not end in time, and its output."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_seconds:.0f} s", ""
    return done.returncode, done.stdout.decode(errors="replace")


def stop_all(processes: Sequence[RankProcess], grace_seconds: float) -> None:
    """Ends the processes: SIGTERM, then SIGKILL for those that are still running after the grace time.

    A process that blocks SIGTERM, as the launcher's own ranks do under Slurm, is killed at once.
    """
    for process in processes:
        process.send_signal(signal.SIGKILL if blocks_sigterm(process.pid) else signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        if not process.wait(max(0.0, deadline - time.monotonic())):
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait(5.0)


def children() -> set[psutil.Process]:
    """The processes below this one."""
    return set(psutil.Process().children(recursive=True))


def with_children(processes: Collection[psutil.Process]) -> set[psutil.Process]:
    """The processes that still run, and those below them."""
    found = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    return found


def kill_all(processes: Collection[psutil.Process]) -> None:
    """Kills processes and waits for their end."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_KILLED_SECONDS)


@contextlib.contextmanager
def signals_blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Blocks signals for processes started inside the block, and their children. The caller receives them after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def blocks_sigterm(pid: int) -> bool:
    """Whether the main thread of a process blocks SIGTERM. False if the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    blocked = next((line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")), "0")
    return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)


def _copy_lines(source: IO[bytes], log: IO[bytes]) -> None:
    """Writes a rank's output to its log, each line with the time at which it arrived.

    Lines that cannot be written are dropped: a rank fails when nobody reads its output any more.
    """
    rest = b""
    with source, log:
        while chunk := os.read(source.fileno(), 65536):
            *lines, rest = _LINE_END.split(rest + chunk)
            if lines:
                _write(log, lines)
        if rest:
            _write(log, [rest])


def _write(log: IO[bytes], lines: Sequence[bytes]) -> None:
    # The rank itself reports a full disk.
    with contextlib.suppress(OSError):
        log.write(_stamped(lines))


def _stamped(lines: Sequence[bytes]) -> bytes:
    now = utc_now().encode()
    return b"".join(now + b" " + line + b"\n" for line in lines)

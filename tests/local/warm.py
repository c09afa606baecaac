"""Ranks forked from one process that has torch, transformers and DeepSpeed imported already.

A fresh rank spends some five seconds of a core on these imports, the same each time. `forked_ranks()` makes agents of
this process fork their ranks instead of starting them; each is a process, a session and a process group of its own with
its own environment, as a started one is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

_PR_SET_PDEATHSIG = 1
_IMPORTED = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "PYTHONPATH", "CUDA_HOME", "LD_LIBRARY_PATH")
"""What the libraries read while they are imported: a rank with another value is started afresh."""


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Within it, `python -m MODULE` of an agent is forked from the warm process."""
    changed = SimpleNamespace(**{**vars(subprocess), "Popen": _popen})
    with mock.patch("launcher.fleet.process.subprocess", changed):
        yield


def _popen(command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **options: Any) -> Any:
    module = command[-1] if "-m" in command[1:-1] and command[-2] == "-m" else None
    if module is None or any(env.get(name) != os.environ.get(name) for name in _IMPORTED):
        return subprocess.Popen(command, env=env, pass_fds=pass_fds, **options)
    return ForkedProcess(module, env, pass_fds[0])


class ForkedProcess:
    """What an agent uses of subprocess.Popen: pid, stdin, stdout, poll and wait."""

    def __init__(self, module: str, environment: Mapping[str, str], report: int) -> None:
        orders_in, orders_out = os.pipe()
        output_in, output_out = os.pipe()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(_server()))
        request = json.dumps({"module": module, "environment": dict(environment), "folder": str(Path.cwd())}).encode()
        socket.send_fds(self._line, [len(request).to_bytes(8)], [orders_in, output_out, report])
        self._line.sendall(request)
        os.close(orders_in)
        os.close(output_out)
        self.stdin, self.stdout = os.fdopen(orders_out, "wb"), os.fdopen(output_in, "rb")
        self.pid = int(self._word())
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def _follow(self) -> None:
        self.returncode = int(self._word() or -signal.SIGKILL)
        self._ended.set()

    def _word(self) -> bytes:
        word = b""
        while (byte := self._line.recv(1)) not in (b"\n", b""):
            word += byte
        return word


_started: dict[str, Path] = {}


def _server() -> Path:
    """The socket of this process's warm process, which is started at the first call and ends with this process."""
    if "socket" not in _started:
        path = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=listener.fileno(), start_new_session=True, cwd=Path.cwd()
        )
        listener.close()
        atexit.register(process.kill)
        _started["socket"] = path
    return _started["socket"]


def _serve(listener: socket.socket) -> None:
    """Forks a rank for every request, and reports its end on the connection that the request came by."""
    lines: dict[int, socket.socket] = {}
    wake_in, wake_out = os.pipe()
    os.set_blocking(wake_out, False)
    signal.set_wakeup_fd(wake_out)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([listener, wake_in], [], [])
        if wake_in in ready:
            os.read(wake_in, 4096)
        _report_ended(lines)
        if listener in ready:
            line, _ = listener.accept()
            pid = _fork(line, [listener, *lines.values()], (wake_in, wake_out))
            lines[pid] = line
            with contextlib.suppress(OSError):
                line.sendall(f"{pid}\n".encode())


def _report_ended(lines: dict[int, socket.socket]) -> None:
    for pid in list(lines):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with lines.pop(pid) as line, contextlib.suppress(OSError):
                line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _fork(line: socket.socket, others: Sequence[socket.socket], wakes: Sequence[int]) -> int:
    size, fds, _, _ = socket.recv_fds(line, 8, 3)
    wanted, request = int.from_bytes(size), b""
    while len(request) < wanted:
        request += line.recv(wanted - len(request))
    asked = json.loads(request)
    if pid := os.fork():
        for fd in fds:
            os.close(fd)
        return pid
    _become(asked, fds, [*(one.detach() for one in (line, *others)), *wakes])
    raise AssertionError("a forked rank does not return")


def _become(asked: dict[str, Any], fds: Sequence[int], closed: Sequence[int]) -> None:
    """Turns this process into the rank."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        orders, output, report = fds
        for fd in closed:
            os.close(fd)
        for source, target in ((orders, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdin = os.fdopen(0, "r")
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"], LAUNCHER_REPORT_FD=str(report))
        sys.argv = [asked["module"]]
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main() -> None:
    listener = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from launcher.worker import train  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked"
    # Ends with the process that started it, however that ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _serve(listener)


if __name__ == "__main__":
    _main()

"""A process that has torch, transformers and DeepSpeed imported, and forks the launcher's Python processes.

`fork_environment()` starts it once for this process, and returns the variables by which `launcher` commands, and the
agents of a Ray that is started with them, use it. `forking()` has code of this process use it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.forked import fork_client
from tests.time_limit import TIME_LIMIT_SECONDS

_PR_SET_PDEATHSIG = 1
REPOSITORY = Path(__file__).parents[1]
_PREPARED = (
    "datasets",
    "launcher.prepare.request",
    "launcher.worker.exporter",
    "launcher.worker.train",
    # Imported late, when an engine is made.
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "torch._inductor.compile_fx",
    "transformers.models.llama.modeling_llama",
)
"""What is imported before the first fork."""
# pyarrow's allocator would start a thread.
SERVER_SETTINGS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_server: dict[str, str] = {}


def fork_environment() -> dict[str, str]:
    """The variables by which processes use this process's fork server, which ends with this process."""
    if not _server:
        path = Path(tempfile.mkdtemp(prefix="fork-server-")) / "socket"
        process = subprocess.Popen(server_command(path), env={**os.environ, **SERVER_SETTINGS}, cwd=REPOSITORY)
        atexit.register(process.kill)
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not fork_client.settings_file(str(path)).exists():
            assert process.poll() is None and time.monotonic() < deadline, "the fork server did not start"
            time.sleep(0.02)
        _server.update(variables_for(path))
    return dict(_server)


def server_command(path: Path) -> list[str]:
    """Starts a server at a socket; to be run in REPOSITORY with SERVER_SETTINGS."""
    return [sys.executable, "-m", __name__, str(path)]


def variables_for(path: Path) -> dict[str, str]:
    """The variables by which processes use the server at a socket."""
    return {fork_client.SERVER: str(path), "PYTHONPATH": fork_client.FOLDER}


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Within it the launcher's modules in this process start their Python processes as forks."""
    variables = {fork_client.SERVER: fork_environment()[fork_client.SERVER]}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        for name in fork_client.PATCHED:
            module = importlib.import_module(name)
            stack.enter_context(mock.patch.object(module, "subprocess", fork_client.REPLACEMENT))
        yield


def _serve(listener: socket.socket) -> None:
    """Forks a process for every request, and reports its end on the connection that the request came by."""
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
    size, fds, _, _ = socket.recv_fds(line, 8, 8)
    wanted, request = int.from_bytes(size, "big"), b""
    while len(request) < wanted:
        request += line.recv(wanted - len(request))
    asked = json.loads(request)
    if pid := os.fork():
        for fd in fds:
            os.close(fd)
        return pid
    _become(asked, fds, [*(one.detach() for one in (line, *others)), *wakes])
    raise AssertionError("a forked process does not return")


def _become(asked: dict[str, Any], fds: Sequence[int], closed: Sequence[int]) -> None:
    """Turns this process into the one that was asked for. The only descriptor passed on is that of a rank's reports."""
    import torch

    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if asked["new_session"]:
            os.setsid()
        for fd in closed:
            os.close(fd)
        for target, source in enumerate(fds[:3]):
            os.dup2(source, target)
            os.close(source)
        sys.stdin = os.fdopen(0, "r")
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if fds[3:]:
            os.environ["LAUNCHER_REPORT_FD"] = str(fds[3])
        sys.argv = [asked["module"], *asked["arguments"]]
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main(path: Path) -> None:
    # Ends with the process that started it, however that ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    # Whoever finds the settings may connect, and waits for the imports.
    fork_client.write_settings(str(path), os.environ)
    for name in _PREPARED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked"
    _serve(listener)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

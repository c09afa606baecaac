"""A process that has torch, transformers and DeepSpeed imported, and forks the ranks of its node.

`python -P -m launcher.worker.fork_server FD PADDING [MODULE…]`: FD is a listening Unix socket. Each connection asks for
one fork (launcher/fleet/forks.py); its process id and exit status are reported there. A fork has the environment,
standard streams, session, limits and signal mask that it would have as a child of the process that asked. Standard
input is a pipe from the process that started this one: when it closes, that process is gone. The forks are killed with
this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.files import keep_private
from launcher.fleet.fork_traits import take_on
from launcher.fleet.forks import peer_user

MODULES = (
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
"""What is imported before the first fork if no modules are given. A module that does not exist is left to the ranks."""
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
_REQUEST_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Only the owner ends this process: Slurm sends some of these to every process of a job, and ranks save then."""


def main() -> None:
    """Imports, then forks until the owner is gone. A fork runs the module that was asked for."""
    keep_private()
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    listener = socket.socket(fileno=int(sys.argv[1]))
    set_title(f"{sys.executable} -P -m launcher.worker.fork_server")
    # The collector takes a quarter of the time of the imports, and finds next to nothing.
    gc.disable()
    # Nothing will be forked then, and fresh ranks need not wait for these imports.
    useless = sitecustomize_on_path() is not None
    for name in () if useless else sys.argv[3:] or MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # The collector of a fork must not touch, and thereby copy, the memory that all forks share.
    gc.freeze()
    gc.enable()
    end_blas_threads()
    request = serve(listener)
    if request is None:
        os._exit(0)
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def end_blas_threads() -> None:
    """Makes OpenBLAS end the threads that it starts when numpy is imported: it does so before every fork.

    It starts them again, here or in a fork, when they have something to compute.
    """
    if pid := os.fork():
        os.waitpid(pid, 0)
    else:
        os._exit(0)


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Forks a process for every connection, and reports its end there.

    Returns None when standard input closes; in a fork, returns the request.
    """
    running: dict[int, socket.socket] = {}
    wake_in, wake_out = os.pipe()
    os.set_blocking(wake_out, False)
    signal.set_wakeup_fd(wake_out)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        waited: list[Any] = [0, listener, wake_in]
        ready, _, _ = select.select(waited, [], [])
        if wake_in in ready:
            os.read(wake_in, 4096)
        report_ended(running)
        if 0 in ready and not os.read(0, 4096):
            return None
        if listener in ready:
            connection, _ = listener.accept()
            if (asked := received(connection)) is None:
                connection.close()
                continue
            request, fds = asked
            sys.stdout.flush()
            sys.stderr.flush()
            server = os.getpid()
            if (pid := os.fork()) == 0:
                os.close(wake_in)
                os.close(wake_out)
                become(request, fds, connection, [listener, *running.values()], server)
                return request
            running[pid] = connection
            close_all(fds)


def report_ended(running: dict[int, socket.socket]) -> None:
    """Reports the exit statuses of forks that have ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection, contextlib.suppress(OSError):
                send(connection, {"exit": os.waitstatus_to_exitcode(status)})


def received(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The request of a connection and its file descriptors; None if nothing is to be forked for it."""
    fds: list[int] = []
    try:
        if peer_user(connection) == os.getuid():
            connection.settimeout(_REQUEST_SECONDS)
            request, fds = receive(connection)
            reason = cannot_fork(request) if request else None
            if reason:
                send(connection, {"refused": reason})
            elif request and not gone(connection):
                return request, fds
    except (OSError, ValueError, KeyError):
        traceback.print_exc()
    close_all(fds)
    return None


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and its file descriptors: the three standard streams, and those that it names.

    The request is empty if the connection was closed: somebody looked whether this process still runs.
    """
    size, fds, _, _ = socket.recv_fds(connection, 8, 16)
    if not size:
        return {}, list(fds)
    wanted, text = int.from_bytes(size, "big"), b""
    while len(text) < wanted:
        part = connection.recv(wanted - len(text))
        if not part:
            raise ConnectionError("the request ends early")
        text += part
    return json.loads(text), list(fds)


def send(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def gone(connection: socket.socket) -> bool:
    """Whether the other side no longer waits."""
    waits, _, _ = select.select([connection], [], [], 0)
    return bool(waits) and connection.recv(1, socket.MSG_PEEK) == b""


def cannot_fork(request: dict[str, Any]) -> str | None:
    """Why a fork of this process would not be as a fresh one; None if it would."""
    if request["safe_path"] != sys.flags.safe_path:
        return "the fork server has another import path"
    if customizes := sitecustomize_on_path():
        return f"{customizes} runs at the start of every Python, and may depend on the rank"
    if len(threads := _threads()) > 1:
        return f"the imports have started threads: {', '.join(sorted(threads))}"
    links = {_link(fd) for fd in Path("/proc/self/fd").iterdir()}
    if devices := sorted(link for link in links if link.startswith(_DEVICES)):
        return f"the imports have opened {', '.join(devices)}"
    return None


def sitecustomize_on_path() -> str | None:
    """The user's sitecustomize.py on PYTHONPATH, which ran here without the variables of a rank.

    Returns None if it does not exist or has `SAME_FOR_ALL_RANKS = True`.
    """
    module: Any = sys.modules.get("sitecustomize")
    file = getattr(module, "__file__", None)
    if file is None or getattr(module, "SAME_FOR_ALL_RANKS", False):
        return None
    folders = {Path(folder).resolve() for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder}
    return str(file) if Path(file).resolve().parent in folders else None


def become(
    request: dict[str, Any],
    fds: Sequence[int],
    connection: socket.socket,
    others: Sequence[socket.socket],
    server: int,
) -> None:
    """Turns this fork into the process that was asked for; ends it if that fails."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        # Detached: the objects must not close what gets these numbers later.
        close_all([other.detach() for other in others])
        reason = begin(request, fds)
        send(connection, {"refused": reason} if reason else {"pid": os.getpid()})
        connection.close()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if reason:
        os._exit(0)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def begin(request: dict[str, Any], fds: Sequence[int]) -> str | None:
    """Gives this fork its streams, environment and settings. Returns why it cannot be used, or None."""
    modules: dict[str, Any] = dict(sys.modules)
    if "torch" in modules and modules["torch"].cuda._is_in_bad_fork():
        return "the imports have initialised CUDA"
    streams, named = fds[:3], fds[3:]
    try:
        take_on(request["as"])
    except (OSError, ValueError) as error:
        return f"the settings of its process cannot be taken on: {error}"
    for target, source in enumerate(streams):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"], **{name: str(fd) for name, fd in zip(request["fds"], named, strict=True)})
    if "numpy" in modules:
        # Python's own generator does this in every fork.
        modules["numpy"].random.seed()
    words = [sys.executable, *(["-P"] if request["safe_path"] else []), "-m", request["module"], *request["arguments"]]
    set_title(" ".join([*words, "rank", os.environ.get("RANK", "")]))
    return None


def set_title(title: str) -> None:
    """Shows a command line in ps and top, in the memory of that of this process; the end is cut if it is too long."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    # Where the last byte is not zero, Linux shows the text up to the first zero.
    text = title.encode()[: end - start - 2].ljust(end - start - 1, b"\0") + b"-"
    ctypes.memmove(start, text, len(text))


def _threads() -> list[str]:
    """The names of this process's threads."""
    return [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]


def _link(path: Path) -> str:
    with contextlib.suppress(OSError):
        return str(path.readlink())
    return ""


if __name__ == "__main__":
    main()

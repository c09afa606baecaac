"""Starts Python modules as forks of a process that has their libraries imported already.

A fresh rank spends some five seconds of a core on importing torch, transformers and DeepSpeed. `ForkedPopen` is a
subprocess.Popen that asks the fork server (tests/fork_server.py) for the process instead; it has its own environment,
standard streams and session, as a started one has, but is a child of the server.

Standard library only: sitecustomize.py imports it in every process whose PYTHONPATH has this folder.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = str(Path(__file__).parent)
SERVER = "FORK_SERVER"
"""The variable that names the server's socket."""
PATCHED = ("launcher.fleet.process", "launcher.prepare", "launcher.prepare.universal", "launcher.runs.export")
"""The modules whose `subprocess` is replaced."""
MODULES = (
    "launcher.prepare",
    "launcher.worker",
    "launcher.worker.health_probe",
    "launcher.worker.exporter",
    "deepspeed.checkpoint.ds_to_universal",
    "tests.local.dying_worker",
    "tests.local.faulty_worker",
    "tests.local.raising_worker",
    "tests.local.waiting_worker",
)
_POLL_SECONDS = 0.05
_IMPORT_SETTINGS = ("DS_ACCELERATOR", "CUDA_HOME", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE", "HF_HOME")
"""What the libraries read while they are imported: a process that wants another value is started afresh."""


def import_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The values of an environment that must be those of the server, and folders that change a Python at its start."""
    path = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part and part != FOLDER]
    changing = [part for part in path if (Path(part) / "sitecustomize.py").exists()]
    found = {name: environment[name] for name in _IMPORT_SETTINGS if name in environment}
    return {**found, "PYTHONPATH": os.pathsep.join(changing)}


def settings_file(server: str) -> Path:
    """Where a server writes its import settings."""
    return Path(f"{server}.json")


def write_settings(server: str, environment: Mapping[str, str]) -> None:
    """Has clients use a server that was started with an environment."""
    new = Path(f"{server}.new")
    new.write_text(json.dumps(import_settings(environment)))
    new.rename(settings_file(server))


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """A fork where the server can make one, else an ordinary process. Raises OSError where the server has ended."""
    forkable = _forkable(command, options.get("env") or os.environ)
    return ForkedPopen(command, **options) if forkable else subprocess.Popen(command, **options)


def run(
    command: Sequence[str], *, timeout: float | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """subprocess.run without its `input` and `capture_output`."""
    with popen(command, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


REPLACEMENT = SimpleNamespace(**{**vars(subprocess), "Popen": popen, "run": run})
"""What a patched module has for `subprocess`."""


def _forkable(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    if SERVER not in os.environ or _module_and_arguments(command) is None:
        return False
    try:
        settings = json.loads(settings_file(os.environ[SERVER]).read_text())
    except OSError:
        return False
    return bool(settings == import_settings(environment))


def _module_and_arguments(command: Sequence[str]) -> tuple[str, list[str]] | None:
    """The module and arguments of `python [-P] -m MODULE ARGUMENTS…`; None for other commands."""
    program, *words = command
    if program != sys.executable:
        return None
    if words[:1] == ["-P"]:
        words = words[1:]
    return (words[1], list(words[2:])) if words[:1] == ["-m"] and words[1] in MODULES else None


class ForkedPopen(subprocess.Popen[bytes]):
    """A process that the fork server forks. Raises OSError where the server has ended."""

    # The parameters are those of subprocess.Popen._execute_child since Python 3.11.
    # ruff: noqa: ARG002
    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: Any,
        shell: Any,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        restore_signals: Any,
        gid: Any,
        gids: Any,
        uid: Any,
        umask: Any,
        start_new_session: bool,
        process_group: Any,
    ) -> None:
        standard = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        module, arguments = _module_and_arguments(args)  # type: ignore[misc]
        request = {
            "module": module,
            "arguments": arguments,
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "new_session": bool(start_new_session),
        }
        self._line = socket.socket(socket.AF_UNIX)
        try:
            self._line.connect(os.environ[SERVER])
            text = json.dumps(request).encode()
            socket.send_fds(self._line, [len(text).to_bytes(8, "big")], [*standard, *pass_fds])
            self._line.sendall(text)
            self.pid = int(self._word() or b"0")
            if not self.pid:
                raise ConnectionError("the fork server has ended")
        except BaseException:
            self._line.close()
            raise
        self._child_created = True
        self._ended = threading.Event()
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        threading.Thread(target=self._follow, daemon=True).start()

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if timeout is None:
            self._ended.wait()
            return self.returncode
        # Looks now and then, as subprocess.Popen does: a thread that waits without a limit is the first to know.
        deadline = time.monotonic() + timeout
        while not self._ended.is_set():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(_POLL_SECONDS)
        return self.returncode

    def _follow(self) -> None:
        self.returncode = int(self._word() or -9)
        self._line.close()
        self._ended.set()

    def _word(self) -> bytes:
        word = b""
        while (byte := self._line.recv(1)) not in (b"\n", b""):
            word += byte
        return word

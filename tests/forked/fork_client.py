"""Starts Python modules of the launcher, besides ranks, as forks of the tests' fork server.

A fresh process spends some five seconds of a core on importing torch, transformers and DeepSpeed. `ForkedPopen` is a
subprocess.Popen that asks the fork server (tests/fork_server.py) for the process instead; it has its own environment,
standard streams and session, as a started one has, but is a child of the server.

Imports only the standard library until it starts a process: sitecustomize.py imports it in every process whose
PYTHONPATH has this folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.fleet.forks import ForkServer

FOLDER = str(Path(__file__).parent)
SERVER_VARIABLE = "LAUNCHER_FORK_SERVER"
"""That of launcher.fleet.forks, which names the file of the server."""
PATCHED = ("launcher.fleet.process", "launcher.prepare", "launcher.prepare.universal", "launcher.runs.export")
"""The modules whose `subprocess` is replaced."""
MODULES = (
    "launcher.prepare",
    "launcher.worker.health_probe",
    "launcher.worker.exporter",
    "deepspeed.checkpoint.ds_to_universal",
)
_POLL_SECONDS = 0.05
_IMPORT_SETTINGS = ("DS_ACCELERATOR", "CUDA_HOME", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE", "HF_HOME", "PYTHONPATH")
"""What the libraries read while they are imported: a process that wants another value is started afresh."""


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """A fork where the server can make one, else an ordinary process."""
    server = _server(options.get("env") or os.environ) if _forkable(command, options) else None
    if server is None:
        return subprocess.Popen(command, **options)
    return ForkedPopen(server, [sys.executable, "-P", *_words(command)], **options)


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


def _words(command: Sequence[str]) -> list[str]:
    """The words of `python [-P] -m MODULE ARGUMENTS…` from -m on."""
    return [word for word in command[1:2] if word != "-P"] + list(command[2:])


def _forkable(command: Sequence[str], options: Mapping[str, Any]) -> bool:
    flag, module, *_ = (*_words(command), "", "")
    return command[0] == sys.executable and flag == "-m" and module in MODULES and "cwd" not in options


def _server(environment: Mapping[str, str]) -> ForkServer | None:
    """The fork server, unless the environment has other settings or there is none."""
    from launcher.fleet.forks import ForkServer

    file = Path(os.environ.get(SERVER_VARIABLE, ""))
    if not file.is_file():
        return None
    server = ForkServer.read(file)
    same = all(server.environment.get(name) == environment.get(name) for name in _IMPORT_SETTINGS)
    return server if same and not server.ended() else None


class ForkedPopen(subprocess.Popen[bytes]):
    """A process that the fork server forks. Raises NotForkedError where it cannot."""

    def __init__(self, server: ForkServer, command: Sequence[str], **options: Any) -> None:
        self._server = server
        super().__init__(command, **options)

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
        streams = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        environment = dict(os.environ if env is None else env)
        self._line, self.pid = self._server.begin(args, environment, streams, {})
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
        from launcher.fleet.forks import exit_code

        self.returncode = exit_code(self._line)
        self._ended.set()

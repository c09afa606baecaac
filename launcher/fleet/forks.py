"""Ranks that are forked from a process which has their libraries imported already: the side of an agent.

The process is `python -m launcher.worker.fork_server`. It forks a rank for each connection to its socket, reports its
process id and exit status there, and ends with the process that started it. The socket has a name but no file; both
sides check that the other one is a process of the same user.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from launcher.errors import os_error_text
from launcher.fleet.fork_traits import Traits, differing_variables, passed_on

SERVER = ("-P", "-m", "launcher.worker.fork_server")
SERVER_VARIABLE = "LAUNCHER_FORK_SERVER"
"""Names a file that describes a fork server of this node; agents use it if its ranks are as those that they start."""
IMPORT_SETTINGS = {
    # The allocator of pyarrow would start a thread, and a process with threads cannot be forked.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
PADDING = "-" * 160
"""The last argument of a server: its room in memory is for the command lines of its forks."""
READY_SECONDS = 300.0
"""How long a request waits for the end of the imports, which on shared storage may take minutes."""
_CREDENTIALS = struct.Struct("3i")


class NotForkedError(Exception):
    """The fork server did not fork a rank, and no process is left; the message is why."""


class ServerUnavailableError(NotForkedError):
    """The fork server has ended, or does not answer in time: a later attempt may fork."""


@dataclass(frozen=True)
class ForkServer:
    """A fork server, which may still be importing, as it is described to agents.

    `environment` was its environment when it started.
    """

    name: str
    pid: int
    traits: Traits
    environment: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> ForkServer:
        """The server that a file describes. Raises OSError or ValueError."""
        found = json.loads(file.read_text())
        return cls(found["name"], found["pid"], Traits(**found["traits"]), found["environment"])

    def write(self, file: Path) -> None:
        """Describes the server in a new file that only this user can read: the environment may have secrets."""
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(asdict(self), opened)

    def unlike(self, environment: Mapping[str, str]) -> str | None:
        """Why a rank forked here would not be as a child of this process with this environment; None if it would."""
        wanted = {**environment, **IMPORT_SETTINGS}
        if traits := self.traits.differences(Traits.here()):
            return f"other {', '.join(traits)}"
        if names := differing_variables(self.environment, wanted):
            return f"other values of {', '.join(names)}"
        return None

    def ended(self) -> bool:
        """Whether nothing listens any more."""
        with contextlib.suppress(OSError), self._connect():
            return False
        return True

    def fork(self, command: Sequence[str], environment: Mapping[str, str], fds: Mapping[str, int]) -> ForkedProcess:
        """Starts `command`, which runs a Python module, as `start_process` does. Waits for the end of the imports.

        Raises NotForkedError if the server has ended, cannot be forked, or does not answer in READY_SECONDS.
        """
        with ExitStack() as ours, ExitStack() as theirs:
            (child_in, stdin), (stdout, child_out) = os.pipe(), os.pipe()
            for fd in (child_in, child_out):
                theirs.callback(os.close, fd)
            streams = (os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb", buffering=0))
            for stream in streams:
                ours.enter_context(stream)
            started = self.begin(command, environment, (child_in, child_out, child_out), fds)
            ours.pop_all()
            return ForkedProcess(*started, *streams)

    def begin(
        self, command: Sequence[str], environment: Mapping[str, str], streams: Sequence[int], fds: Mapping[str, int]
    ) -> tuple[socket.socket, int]:
        """A fork with these standard streams: the connection on which its exit is reported, and its process id.

        Raises as `fork` does.
        """
        module, arguments, safe = _module(command)
        request = {
            "module": module,
            "arguments": arguments,
            "safe_path": safe,
            "environment": dict(environment),
            "fds": list(fds),
            "as": passed_on(),
        }
        try:
            with ExitStack() as stack:
                connection = stack.enter_context(self._connect())
                _send(connection, request, [*streams, *fds.values()])
                pid = _answered_pid(connection)
                stack.pop_all()
        except OSError as error:
            raise _not_forked(error) from None
        connection.settimeout(None)
        return connection, pid

    def _connect(self) -> socket.socket:
        """Raises OSError if nothing of this user listens."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(READY_SECONDS)
            connection.connect(f"\0{self.name}")
            if peer_user(connection) != os.getuid():
                raise PermissionError("a process of another user listens")
        except BaseException:
            connection.close()
            raise
        return connection


class OwnForkServer:
    """A fork server that this process starts; it ends with this process, and kills its ranks then."""

    def __init__(self, environment: Mapping[str, str], log: Path, modules: Sequence[str] = ()) -> None:
        """Returns at once, while the server imports what ranks need, or `modules`. Its output goes to `log`.

        Raises OSError.
        """
        variables = {**environment, **IMPORT_SETTINGS}
        name = f"launcher-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX) as listener, log.open("ab") as output:
            # Bound here: from now on clients can connect, and wait for the end of the imports.
            listener.bind(f"\0{name}")
            listener.listen(64)
            fd = listener.fileno()
            self._process = subprocess.Popen(
                [sys.executable, *SERVER, str(fd), PADDING, *modules],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                pass_fds=(fd,),
                # Neither a terminal's Ctrl-C nor a signal to the group of the launcher ends it.
                start_new_session=True,
            )
        self.server = ForkServer(name, self._process.pid, Traits.here(), variables)

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> None:
        """Waits until the server has ended."""
        self._process.wait()

    def close(self) -> None:
        """Ends the server and the ranks that it has forked."""
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class ForkedProcess:
    """A rank that a fork server has forked."""

    def __init__(self, connection: socket.socket, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._connection = connection
        self._code: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._follow, name=f"fork-{pid}", daemon=True).start()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended. Raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self._code is not None
        return self._code

    def _follow(self) -> None:
        self._code = exit_code(self._connection)
        self._ended.set()


def exit_code(connection: socket.socket) -> int:
    """Waits for the end of a fork. Returns its exit status, negative for a signal."""
    with connection, contextlib.suppress(OSError, ValueError, KeyError):
        return int(answer_of(connection)["exit"])
    # A server that ends takes its forks with it.
    return -signal.SIGKILL


def peer_user(connection: socket.socket) -> int:
    """The user id of the process at the other end of a Unix socket."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])


def answer_of(connection: socket.socket) -> dict[str, Any]:
    """The next line of JSON; empty if the other side has closed the connection. Raises OSError."""
    line = b""
    while (byte := connection.recv(1)) not in (b"\n", b""):
        line += byte
    return dict(json.loads(line)) if line else {}


def _answered_pid(connection: socket.socket) -> int:
    """The process id of the fork. Raises NotForkedError or OSError."""
    answer = answer_of(connection)
    if "pid" in answer:
        return int(answer["pid"])
    if not answer:
        raise ServerUnavailableError("the fork server has ended")
    raise NotForkedError(answer.get("refused") or f"a fork ended with status {answer['exit']} at its start")


def _send(connection: socket.socket, request: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Sends the length of the request with the file descriptors, then the request."""
    text = json.dumps(request).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], fds)
    connection.sendall(text)


def _not_forked(error: OSError) -> NotForkedError:
    if isinstance(error, TimeoutError):
        return ServerUnavailableError(f"the fork server did not answer within {READY_SECONDS:.0f} s")
    return ServerUnavailableError(f"the fork server cannot be reached: {os_error_text(error)}")


def _module(command: Sequence[str]) -> tuple[str, list[str], bool]:
    """The module, its arguments, and whether there is a -P, of `python [-P] -m MODULE ARGUMENTS…`."""
    words = list(command[1:])
    safe = words[:1] == ["-P"]
    words = words[safe:]
    if command[0] != sys.executable or words[:1] != ["-m"]:
        raise NotForkedError(f"{' '.join(command)} runs no module of this Python")
    return words[1], words[2:], safe

"""How the nodes of an allocation find each other, before there is a Ray: by connecting to the first of them.

The first node publishes every address it has and a port in a file that all see; the others try them in turn. What
connects is the interface to use, on both sides. The connection stays open as long as the run lasts: when it closes, the
first node is gone, and the others end what they have started.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import FailureCode, RunFailed
from launcher.fleet.network import LOOPBACK, own_addresses
from launcher.run_dir import write_json
from launcher.slurm.startup_errors import Check

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 0.25
_REFUSED_SECONDS = 0.5
_LONGEST_LINE = 64 * 1024


class Line:
    """A connection over which JSON objects go, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = connection.makefile("rb")

    @property
    def own_address(self) -> str:
        return str(self._socket.getsockname()[0])

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_seconds: float | None) -> dict[str, Any] | None:
        """The next message; None where the other side is gone. Raises TimeoutError."""
        self._socket.settimeout(timeout_seconds)
        try:
            line = self._reader.readline(_LONGEST_LINE)
        except TimeoutError:
            raise
        except OSError:
            return None
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        return message if line.endswith(b"\n") and isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@dataclass(frozen=True)
class Guest:
    """Another node at the first one's meeting: its own address by each of the first one's that it reached."""

    node: int
    host: str
    reached: dict[str, str]
    line: Line


class Meeting:
    """The first node's side."""

    def __init__(self, file: Path, key: str, others: int) -> None:
        self._file, self._key, self._others = file, key, others
        # With no other node nobody has to reach this one.
        self._socket = socket.create_server(("" if others else LOOPBACK, 0), backlog=max(128, 2 * others))
        self._guests: dict[int, Guest] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._accept, name="meeting", daemon=True).start()

    def publish(self) -> None:
        """Writes the file by which the others find this node."""
        write_json(self._file, {"addresses": own_addresses(), "port": self._socket.getsockname()[1]})

    def wait(self, timeout_seconds: float, refused: Check = lambda: None) -> list[Guest]:
        """The other nodes, in order. Those that did not come in time are missing from the list.

        `refused` is called now and then, and raises where one of them will not come at all.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._news:
            while len(self._guests) < self._others and (left := deadline - time.monotonic()) > 0:
                self._news.wait(min(left, _REFUSED_SECONDS))
                refused()
            return [self._guests[node] for node in sorted(self._guests)]

    def close(self) -> None:
        """Lets the other nodes go."""
        with self._news:
            for guest in self._guests.values():
                guest.line.close()
        self._file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        """Lets one in that has the run's key; whoever has not is left without an answer."""
        line, challenge = Line(connection), secrets.token_hex(16)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            line.send(challenge=challenge)
            answer = line.receive(_ANSWER_SECONDS)
            if answer and hmac.compare_digest(answer["proof"], _proof(self._key, challenge)):
                if answer.get("probe"):
                    line.send(welcome=True)
                else:
                    self._seat(Guest(answer["node"], answer["host"], answer["reached"], line))
                    return
        line.close()

    def _seat(self, guest: Guest) -> None:
        with self._news:
            self._guests[guest.node] = guest
            self._news.notify_all()


def common_address(guests: list[Guest]) -> str:
    """The first node's address at which every other node reached it. Raises RunFailed where there is none."""
    for address in guests[0].reached:
        if all(address in guest.reached for guest in guests):
            return address
    ways = "; ".join(f"{guest.host} by {', '.join(guest.reached)}" for guest in guests)
    message = f"the nodes reach the first one by different addresses: {ways}; they need one network in common"
    raise RunFailed(message, code=FailureCode.NETWORK)


def attend(file: Path, key_file: Path, node: int, timeout_seconds: float, refused: Check = lambda: None) -> Line:
    """Another node's side: waits for the file, finds the ways to the first node and joins. Raises RunFailed.

    `refused` is called now and then, and raises where another node will not come at all.
    """
    invitation, key = _await_files(file, key_file, timeout_seconds, refused)
    reached: dict[str, str] = {}
    tried = []
    for address in invitation["addresses"]:
        try:
            reached[address] = _probe(address, invitation["port"], key)
        except OSError as error:
            tried.append(f"{address}: {error.strerror or error}")
    if not reached:
        refused()
        message = f"no way to the first node at port {invitation['port']}: {'; '.join(tried)}"
        raise RunFailed(message, code=FailureCode.NETWORK)
    try:
        line = _connect(next(iter(reached)), invitation["port"])
        _answer(line, key, node=node, host=socket.gethostname(), reached=reached)
    except OSError as error:
        refused()
        message = f"the first node went away while this one joined: {error.strerror or error}"
        raise RunFailed(message, code=FailureCode.NODE_LOST) from None
    return line


def _await_files(file: Path, key_file: Path, timeout_seconds: float, refused: Check) -> tuple[dict[str, Any], str]:
    """What the first node wrote, and its key."""
    deadline, waiting = time.monotonic() + timeout_seconds, threading.Event()
    while True:
        found = f"{file} did not appear"
        try:
            return json.loads(file.read_text()), key_file.read_text()
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        except OSError as error:  # such as ESTALE, which a network file system may say for a while
            found = f"{error.filename or file} could not be read ({error.strerror})"
        refused()
        if time.monotonic() > deadline:
            hint = "is output_dir on storage that all nodes share, and did the first node come up?"
            raise RunFailed(f"{found} within {timeout_seconds:.0f} s: {hint}", code=FailureCode.TIMEOUT)
        waiting.wait(_LOOK_AGAIN_SECONDS)


def _probe(address: str, port: int, key: str) -> str:
    """This node's own address on the way to `address`. Raises OSError where nothing of this run answers there."""
    line = _connect(address, port)
    try:
        _answer(line, key, probe=True)
        if not (line.receive(_CONNECT_SECONDS) or {}).get("welcome"):
            raise OSError("something else answers there")
        return line.own_address
    finally:
        line.close()


def _connect(address: str, port: int) -> Line:
    return Line(socket.create_connection((address, port), _CONNECT_SECONDS))


def _answer(line: Line, key: str, **message: Any) -> None:
    greeting = line.receive(_CONNECT_SECONDS)
    if greeting is None or "challenge" not in greeting:
        raise OSError("something else answers there")
    line.send(proof=_proof(key, greeting["challenge"]), **message)


def _proof(key: str, challenge: str) -> str:
    return hmac.new(key.encode(), challenge.encode(), hashlib.sha256).hexdigest()

"""How the nodes of an allocation find each other before Ray runs: all connect to the first node.

The first node writes its addresses and a port to a shared file; the other nodes try the addresses in turn. The address
that works shows which interface to use, on both sides. The connection stays open during the run: when it closes, the
first node is gone, and the other nodes end what they have started.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import select
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
_POLL_SECONDS = 0.25
_CHECK_SECONDS = 0.5
_MAX_LINE_BYTES = 64 * 1024


class Connection:
    """A connection that carries JSON objects, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = connection.makefile("rb")
        self._peer = connection.getpeername()

    @property
    def local_address(self) -> str:
        return str(self._socket.getsockname()[0])

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def readable(self, timeout_seconds: float) -> bool:
        """Whether a message, or the end of the other side, arrives within the time."""
        return bool(select.select([self._socket], [], [], timeout_seconds)[0])

    def receive(self, timeout_seconds: float | None) -> dict[str, Any] | None:
        """The next message; None if the other side is gone. Raises TimeoutError."""
        self._socket.settimeout(timeout_seconds)
        try:
            line = self._reader.readline(_MAX_LINE_BYTES)
        except TimeoutError:
            raise
        except OSError:
            return None
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        return message if line.endswith(b"\n") and isinstance(message, dict) else None

    def peer_host_answers(self) -> bool:
        """Whether the host of the other side answers, if only to refuse another connection."""
        try:
            socket.create_connection(self._peer[:2], _CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True

    def finish(self) -> None:
        """Sends nothing more: the other side reads to the end. Its own messages can still be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def says_goodbye(self, deadline: float) -> bool:
        """Whether the other side sends the message `ended` until the deadline of the monotonic clock."""
        with contextlib.suppress(TimeoutError):
            while True:
                # What has arrived is read even after the deadline, which another node may have used up.
                message = self.receive(max(deadline - time.monotonic(), _POLL_SECONDS))
                if message is None or message.get("ended"):
                    return message is not None
        return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@dataclass(frozen=True)
class JoinedNode:
    """Another node that joined. `reached`: address of the first node → this node's own address on the way to it."""

    node_rank: int
    host: str
    reached: dict[str, str]
    connection: Connection


class RendezvousServer:
    """The first node's side: accepts the other nodes."""

    def __init__(self, file: Path, key: str, others: int) -> None:
        self._file, self._key, self._others = file, key, others
        # Without other nodes, loopback is enough.
        self._socket = socket.create_server(("" if others else LOOPBACK, 0), backlog=max(128, 2 * others))
        self._nodes: dict[int, JoinedNode] = {}
        self._joined = threading.Condition()
        threading.Thread(target=self._accept, name="rendezvous", daemon=True).start()

    def publish(self) -> None:
        """Writes the file through which the other nodes find this one."""
        write_json(self._file, {"addresses": own_addresses(), "port": self._socket.getsockname()[1]})

    def wait(self, timeout_seconds: float, check: Check = lambda: None) -> list[JoinedNode]:
        """Waits for the other nodes and returns them in order, without those that did not join in time.

        `check` is called while waiting; it raises if one of them has failed.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._joined:
            while len(self._nodes) < self._others and (left := deadline - time.monotonic()) > 0:
                self._joined.wait(min(left, _CHECK_SECONDS))
                check()
            return [self._nodes[node] for node in sorted(self._nodes)]

    def wait_for_ends(self, timeout_seconds: float) -> list[JoinedNode]:
        """Ends the other nodes, and returns those that do not report their end in time: they are lost."""
        with self._joined:
            nodes = list(self._nodes.values())
        for node in nodes:
            with contextlib.suppress(OSError):
                node.connection.send(end=True)
            node.connection.finish()
        deadline = time.monotonic() + timeout_seconds
        return [node for node in nodes if not node.connection.says_goodbye(deadline)]

    def close(self) -> None:
        """Closes all connections, which ends the other nodes."""
        with self._joined:
            for node in self._nodes.values():
                node.connection.close()
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
            threading.Thread(target=self._authenticate, args=(connection,), daemon=True).start()

    def _authenticate(self, accepted: socket.socket) -> None:
        """Accepts a node that has the run's key; others get no answer."""
        connection, challenge = Connection(accepted), secrets.token_hex(16)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            connection.send(challenge=challenge)
            answer = connection.receive(_ANSWER_SECONDS)
            if answer and hmac.compare_digest(answer["proof"], _proof(self._key, challenge)):
                if answer.get("probe"):
                    connection.send(welcome=True)
                else:
                    self._add(JoinedNode(answer["node"], answer["host"], answer["reached"], connection))
                    return
        connection.close()

    def _add(self, node: JoinedNode) -> None:
        with self._joined:
            self._nodes[node.node_rank] = node
            self._joined.notify_all()


def common_address(nodes: list[JoinedNode]) -> str:
    """An address at which every other node reached the first one. Raises RunFailed if no address qualifies."""
    for address in nodes[0].reached:
        if all(address in node.reached for node in nodes):
            return address
    ways = "; ".join(f"{node.host} through {', '.join(node.reached)}" for node in nodes)
    message = f"the nodes reach the first one only through different addresses: {ways}; they need a common network"
    raise RunFailed(message, code=FailureCode.NETWORK)


def join(file: Path, key_file: Path, node: int, timeout_seconds: float, check: Check = lambda: None) -> Connection:
    """Another node's side: waits for the file, tries the first node's addresses and joins. Raises RunFailed.

    `check` is called while waiting; it raises if another node has failed.
    """
    published, key = _await_files(file, key_file, timeout_seconds, check)
    reached: dict[str, str] = {}
    tried = []
    for address in published["addresses"]:
        try:
            reached[address] = _probe(address, published["port"], key)
        except OSError as error:
            tried.append(f"{address}: {error.strerror or error}")
    if not reached:
        check()
        message = f"cannot connect to the first node at port {published['port']}: {'; '.join(tried)}"
        raise RunFailed(message, code=FailureCode.NETWORK)
    try:
        connection = _connect(next(iter(reached)), published["port"])
        _answer(connection, key, node=node, host=socket.gethostname(), reached=reached)
    except OSError as error:
        check()
        message = f"the first node ended while this one joined: {error.strerror or error}"
        raise RunFailed(message, code=FailureCode.NODE_LOST) from None
    return connection


def _await_files(file: Path, key_file: Path, timeout_seconds: float, check: Check) -> tuple[dict[str, Any], str]:
    """Waits for what the first node wrote: its addresses and port, and the key."""
    deadline, waiting = time.monotonic() + timeout_seconds, threading.Event()
    while True:
        found = f"{file} did not appear"
        try:
            return json.loads(file.read_text()), key_file.read_text()
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        except OSError as error:  # such as ESTALE, which a network file system may report for a while
            found = f"{error.filename or file} could not be read ({error.strerror})"
        check()
        if time.monotonic() > deadline:
            hint = "check that output_dir is on storage that all nodes share, and that the first node started"
            raise RunFailed(f"{found} within {timeout_seconds:.0f} s: {hint}", code=FailureCode.TIMEOUT)
        waiting.wait(_POLL_SECONDS)


def _probe(address: str, port: int, key: str) -> str:
    """This node's own address on the way to `address`. Raises OSError if this run does not answer there."""
    connection = _connect(address, port)
    try:
        _answer(connection, key, probe=True)
        if not (connection.receive(_CONNECT_SECONDS) or {}).get("welcome"):
            raise OSError("another program answers there")
        return connection.local_address
    finally:
        connection.close()


def _connect(address: str, port: int) -> Connection:
    return Connection(socket.create_connection((address, port), _CONNECT_SECONDS))


def _answer(connection: Connection, key: str, **message: Any) -> None:
    greeting = connection.receive(_CONNECT_SECONDS)
    if greeting is None or "challenge" not in greeting:
        raise OSError("another program answers there")
    connection.send(proof=_proof(key, greeting["challenge"]), **message)


def _proof(key: str, challenge: str) -> str:
    return hmac.new(key.encode(), challenge.encode(), hashlib.sha256).hexdigest()

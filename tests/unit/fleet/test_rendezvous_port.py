"""The port of the ranks' rendezvous: no other program gets it between its choice and the start of the ranks."""

from __future__ import annotations

import errno
import os
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.fleet.agent import Agent, NodeTask
from launcher.fleet.network import LOOPBACK, bind_free_port
from tests.time_limit import TIME_LIMIT_SECONDS

LISTENS = """
    import os, socket
    listener = socket.socket(fileno=int(os.environ["LAUNCHER_RENDEZVOUS_FD"])) if os.environ["RANK"] == "0" else None
    print("rank", os.environ["RANK"], "ready", "LAUNCHER_RENDEZVOUS_FD" in os.environ, flush=True)
    while listener:
        connection, _ = listener.accept()
        connection.sendall(b"rank 0")
        connection.close()
"""


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.end(0.0)


def bound(port: int, address: str = "", *, reuse: bool = True) -> socket.socket:
    """As another program binds the port; raises OSError where it is taken."""
    other = socket.socket()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
    try:
        other.bind((address, port))
        other.listen()
    except OSError:
        other.close()
        raise
    return other


@pytest.mark.parametrize("address", ["", LOOPBACK])
def test_nobody_takes_the_port_of_the_launchers_ranks(agent: Agent, address: str) -> None:
    port = agent.reserve_port(address, listen=True)
    with pytest.raises(OSError) as raised:
        bound(port, address)
    assert raised.value.errno == errno.EADDRINUSE


def test_a_script_can_bind_the_port_that_is_held_for_it_and_others_avoid_it(agent: Agent) -> None:
    """torch's store reuses addresses; a program that looks for a free port does not."""
    port = agent.reserve_port(LOOPBACK, listen=False)
    with pytest.raises(OSError) as raised:
        bound(port, reuse=False)
    assert raised.value.errno == errno.EADDRINUSE
    bound(port, reuse=True).close()


def test_ports_that_are_held_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if two agents of a machine look for one in the same order."""
    monkeypatch.setattr("launcher.fleet.network.secrets.token_hex", lambda _: "the same seed")
    with bind_free_port("", listen=False) as first, bind_free_port("", listen=False) as second:
        assert first.getsockname()[1] != second.getsockname()[1]


def test_a_port_on_all_addresses_is_reached_over_both_protocols() -> None:
    with bind_free_port("", listen=True) as listener:
        socket.create_connection((LOOPBACK, listener.getsockname()[1]), TIME_LIMIT_SECONDS).close()
        if (
            socket.has_dualstack_ipv6()
            and Path("/proc/net/if_inet6").exists()
            and Path("/proc/net/if_inet6").read_text()
        ):
            socket.create_connection(("::1", listener.getsockname()[1]), TIME_LIMIT_SECONDS).close()


def test_the_first_rank_listens_at_the_port_and_its_end_closes_it(agent: Agent, tmp_path: Path) -> None:
    port = agent.reserve_port(LOOPBACK, listen=True)
    code = f"exec({textwrap.dedent(LISTENS)!r})"
    folder = tmp_path / "node-0-h0"
    task = NodeTask(0, 0, 2, 2, str(tmp_path), str(folder), dict(os.environ), ("-c", code))
    agent.start(task)
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not all((folder / f"rank-{rank}.log").read_text().count("ready") for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "rank 0 ready True" in (folder / "rank-0.log").read_text()
    assert "rank 1 ready False" in (folder / "rank-1.log").read_text()
    with socket.create_connection((LOOPBACK, port), TIME_LIMIT_SECONDS) as connection:
        assert connection.recv(6, socket.MSG_WAITALL) == b"rank 0"
    agent.end(TIME_LIMIT_SECONDS)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, port), TIME_LIMIT_SECONDS)

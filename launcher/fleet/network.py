"""A node's network: the interface that reaches the other nodes, found by connecting to them, and free ports."""

from __future__ import annotations

import contextlib
import random
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.errors import RunFailed

LOOPBACK = "127.0.0.1"
_HELLO = b"launcher\n"
_LOWEST_PORT, _PORT_TRIES = 20000, 1000


@dataclass(frozen=True)
class PortProbeResult:
    """A connection to another node: its local address, and the interface that has this address."""

    address: str
    interface: str | None


class ProbePort:
    """A port on all interfaces that answers every connection: it shows that this node can be reached."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, name="probe-port", daemon=True).start()

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(_HELLO)


def reach(address: str, port: int, timeout_seconds: float) -> PortProbeResult:
    """Connects to the probe port of another node. Raises OSError if it cannot be reached."""
    with socket.create_connection((address, port), timeout_seconds) as connection:
        if connection.recv(len(_HELLO)) != _HELLO:
            raise OSError(f"another program listens at {address}:{port}")
        own: str = connection.getsockname()[0]
    return PortProbeResult(own, interface_of(own))


def interface_of(address: str) -> str | None:
    """The name of this machine's interface with `address`, or None."""
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in found):
            return name
    return None


def own_addresses() -> list[str]:
    """Every IPv4 address of this machine, fastest interfaces first; loopback only if there is no other."""
    speeds = {name: state.speed for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = psutil.net_if_addrs()
    found = [
        entry.address
        for name in sorted(speeds, key=lambda name: -speeds[name])
        for entry in addresses.get(name, [])
        if entry.family == socket.AF_INET
    ]
    return [address for address in found if not address.startswith("127.")] or found


def free_ports(seed: str) -> Iterator[int]:
    """Free TCP ports, each once, in an order that depends on the seed. Raises RunFailed if none is free.

    They are outside the kernel's range for outgoing connections, where any process could take a port before it is
    bound, and outside the range of Ray's workers (10002 to 19999).
    """
    rng = random.Random(seed)
    candidates = range(_LOWEST_PORT, _lowest_outgoing_port())
    for port in rng.sample(candidates, min(_PORT_TRIES, len(candidates))):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port
    raise RunFailed(f"no free TCP port found on {socket.gethostname()} in {_PORT_TRIES} tries")


def bind_free_port(address: str, *, listen: bool) -> socket.socket:
    """A socket bound to a free port of an address, or of all addresses (""). Raises RunFailed if none is free.

    Programs that reuse addresses, as torch's store does, can bind a port that is bound but not listened to.
    """
    families = [socket.AF_INET6] if ":" in address else [socket.AF_INET]
    if address == "" and socket.has_dualstack_ipv6():
        families.insert(0, socket.AF_INET6)
    for port in free_ports(secrets.token_hex(8)):
        for family in families:
            bound = socket.socket(family)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                bound.bind((address, port))
                if listen:
                    bound.listen(1024)
            except OSError:
                bound.close()
                continue
            return bound
    raise RunFailed(f"no free TCP port found on {socket.gethostname()}")


def _lowest_outgoing_port() -> int:
    """The start of the kernel's range for outgoing connections; Linux's default if it cannot be read."""
    try:
        return max(_LOWEST_PORT + 1000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return 32768

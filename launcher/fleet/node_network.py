"""The network between the nodes of a run: each node's interface, and how far the clocks differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from launcher.errors import FailureCode, RunFailed
from launcher.fleet.agent_calls import answers
from launcher.fleet.node import Node

_REACH_SECONDS = 10.0
_CLOCK_ROUNDS = 3


def with_interfaces(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with their interfaces, found by connecting every node to the first one. Raises RunFailed."""
    first, others = nodes[0], nodes[1:]
    port, interface = answers([first.agent.open_probe_port.remote(), first.agent.interface_of.remote(first.address)])
    calls = [node.agent.reach.remote(first.address, port, _REACH_SECONDS) for node in others]
    found = answers(calls, others)
    answers([first.agent.close_probe_port.remote()])
    unreachable = [
        f"node {rank} ({node.host}) cannot connect to node 0 ({first.host}) at {first.address}: {reached}"
        for rank, (node, reached) in enumerate(zip(others, found, strict=True), start=1)
        if isinstance(reached, str)
    ]
    if unreachable:
        hint = "every node must reach every other node over TCP, at the address that Ray has for it"
        raise RunFailed(f"{'; '.join(unreachable)}\n  {hint}", code=FailureCode.NETWORK)
    rest = [replace(node, interface=reached.interface) for node, reached in zip(others, found, strict=True)]
    return [replace(first, interface=interface), *rest]


def with_clock_offsets(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with how far each clock is ahead of this machine's. Raises RunFailed."""
    return [replace(node, clock_offset_seconds=_clock_offset(node)) for node in nodes]


def _clock_offset(node: Node) -> float:
    """Seconds by which the node's clock is ahead, from the fastest of a few round trips."""
    found = []
    for _ in range(_CLOCK_ROUNDS):
        asked = time.time()
        theirs: float = answers([node.agent.clock.remote()], [node])[0]
        answered = time.time()
        found.append((answered - asked, theirs - (asked + answered) / 2))
    return round(min(found)[1], 3)

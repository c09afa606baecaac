"""Calls of agents through Ray: each answer, or the node that failed or did not answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.errors import FailureCode, RunFailed, code_of, first_line
from launcher.fleet.node import Node

ANSWER_SECONDS = 120.0


def call_agents(
    nodes: Sequence[Node], method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = ANSWER_SECONDS
) -> list[Any]:
    """Calls `method` of each node's agent with its own arguments; returns the answers in order. Raises RunFailed."""
    calls = [getattr(node.agent, method).remote(*given) for node, given in zip(nodes, arguments, strict=True)]
    return answers(calls, nodes, seconds)


def answers(
    references: Sequence[Any], nodes: Sequence[Node] | None = None, seconds: float = ANSWER_SECONDS
) -> list[Any]:
    """The agents' answers, in order. Raises RunFailed for an agent that fails or does not answer; names its node."""
    import ray

    found = []
    for index, reference in enumerate(references):
        try:
            found.append(ray.get(reference, timeout=seconds))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            message = f"{_named(index, nodes)}: {type(cause).__name__}: {first_line(cause)}"
            raise RunFailed(message, code=code_of(cause)) from None
        except ray.exceptions.RayError as error:
            hint = "the same launcher version must be installed on every node, in the Python that Ray uses there"
            message = f"{_named(index, nodes)} does not answer: {first_line(error)}\n  {hint}"
            late = isinstance(error, ray.exceptions.GetTimeoutError)
            raise RunFailed(message, code=FailureCode.TIMEOUT if late else None) from None
    return found


def _named(index: int, nodes: Sequence[Node] | None) -> str:
    return f"node {index} ({nodes[index].host})" if nodes else f"agent {index}"

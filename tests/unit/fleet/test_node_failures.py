"""Which failures are those of a node itself: broken machines, not errors in code or data."""

from __future__ import annotations

import pytest

from launcher.errors import FailureCode
from launcher.fleet.failures import Failure
from launcher.fleet.node_failures import failed_nodes

HOSTS = ("h0", "h1", "h2")
ECC = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"


def failed(
    node: int, code: FailureCode = FailureCode.UNKNOWN, error: str | None = None, rank: int | None = 9
) -> Failure:
    how = {FailureCode.RANK_KILLED: "signal SIGKILL", FailureCode.NODE_LOST: "no answer for 20 s"}.get(
        code, "exit code 1"
    )
    return Failure(rank, node, 0.0, how, error, code=code)


KILLED, LOST, CRASHED = FailureCode.RANK_KILLED, FailureCode.NODE_LOST, FailureCode.RANK_CRASHED
PEER = failed(0, FailureCode.PEER_LOST, "RuntimeError: Connection closed by peer")


@pytest.mark.parametrize(
    ("failures", "found"),
    [
        ([failed(1, KILLED)], {"h1": "rank 9: signal SIGKILL"}),
        ([failed(1, LOST, rank=None)], {"h1": "no answer for 20 s"}),
        ([failed(1, CRASHED), failed(1, CRASHED)], {"h1": "rank 9: exit code 1"}),
        ([failed(2, error=ECC + "\nand more")], {"h2": f"rank 9: {ECC}"}),
        # The rank of another node notices the loss first.
        ([PEER, failed(2, LOST, rank=None)], {"h2": "no answer for 20 s"}),
        ([failed(0, LOST, rank=None), failed(2, LOST, rank=None)], dict.fromkeys(("h0", "h2"), "no answer for 20 s")),
        # A GPU that fails takes no other rank with it but by its absence.
        ([failed(2, error=ECC), PEER, failed(1, FailureCode.ENDED)], {"h2": f"rank 9: {ECC}"}),
        # Ray gives such a notice of a machine that works.
        ([failed(1, FailureCode.NODE_DRAINED, rank=None)], {}),
        ([], {}),
        ([PEER], {}),
        ([failed(1, error="ValueError: a bad sample")], {}),
        ([failed(1, FailureCode.NAN_LOSS), failed(2, KILLED)], {}),
        ([failed(1, FailureCode.OUT_OF_MEMORY)], {}),
        ([failed(1, FailureCode.OUT_OF_GPU_MEMORY, "CUDA error: out of memory")], {}),
        ([failed(1, error="CUDA error: device-side assert triggered")], {}),
        # All nodes fail: a switch, a batch that crashes a kernel, or the job's own memory.
        ([failed(node, CRASHED) for node in range(3)], {}),
    ],
)
def test_only_failures_of_a_machine_count_for_its_node(failures: list[Failure], found: dict[str, str]) -> None:
    assert failed_nodes(failures, HOSTS) == found


def test_a_run_on_one_node_does_not_suspect_it() -> None:
    assert failed_nodes([failed(0, KILLED)], ("h0",)) == {}

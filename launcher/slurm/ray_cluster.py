"""The Ray cluster of an allocation: the nodes connect to the first one, and each starts its Ray processes."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.errors import FailureCode, LauncherError, RunFailed, code_of, known_code
from launcher.files import last_lines
from launcher.fleet.network import LOOPBACK
from launcher.fleet.ray_settings import LOOPBACK_ONLY, use_token, write_token
from launcher.run_dir import RunDir
from launcher.slurm.allocation import Allocation, expand_hosts
from launcher.slurm.queue import slurm_job_hosts
from launcher.slurm.ray_node import RayNode
from launcher.slurm.rendezvous import Connection, JoinedNode, RendezvousServer, common_address, join
from launcher.slurm.startup_errors import StartupErrors

_STARTED_SECONDS = 300.0
_ENDED_SECONDS = 20.0
"""How long the other nodes may take to end: each kills its Ray's processes, and waits for them up to 10 s."""
_SHUTDOWN_SECONDS = 60.0
_REMOVAL_SECONDS = 1200.0
"""Longer than Slurm takes to count a node as dead: SlurmdTimeout is 300 s by default."""
_ASK_SECONDS, _ASKS_PER_SECOND = 10.0, 5
"""How often a node asks whether the host of the first one answers, and how many of all nodes may ask in a second."""
_LOG_LINES = 20
_CHECK_SECONDS = 2.0


class FirstNodeLost(RunFailed):
    """The first node is lost. `acts` is True on one of the other nodes, which ends the job for all."""

    code = FailureCode.NODE_LOST

    def __init__(self, message: str, acts: bool) -> None:
        super().__init__(message)
        self.acts = acts


@contextmanager
def first_node(
    allocation: Allocation,
    run: RunDir,
    wait_seconds: float,
    startup_errors: StartupErrors,
    lost: list[str] | None = None,
) -> Iterator[None]:
    """Runs a Ray cluster over all nodes inside the block; RAY_ADDRESS is its address. Raises RunFailed.

    At the end of the block, also after an error, it releases the other nodes and ends everything started here. Hosts
    that do not end then are added to `lost` if it is given.
    """
    folder = run.cluster
    folder.mkdir(mode=0o700, exist_ok=True)
    key_file = _key_file(folder)
    write_token(key_file)
    server = RendezvousServer(_rendezvous_file(run, allocation), key_file.read_text(), allocation.nodes - 1)
    ray: RayNode | None = None
    # Closed last: Ray writes to it until it ends.
    with node_log(run, allocation).open("ab") as log:
        try:
            server.publish()
            nodes = server.wait(wait_seconds, startup_errors.check)
            _check_all_joined(allocation, nodes, wait_seconds)
            if not nodes:
                os.environ.update(LOOPBACK_ONLY)
            address = common_address(nodes) if nodes else LOOPBACK
            use_token(key_file)
            ray = RayNode(allocation, address, None, log)
            ray.start()
            startup_errors.connected()
            _start_others(run, nodes, address, ray.address)
            os.environ["RAY_ADDRESS"] = ray.address
            yield
        finally:
            if lost is not None:
                lost += [node.host for node in server.wait_for_ends(_ENDED_SECONDS)]
            server.close()
            if ray is not None:
                ray.end()
            shutil.rmtree(folder, ignore_errors=True)


def other_node(
    allocation: Allocation,
    run: RunDir,
    wait_seconds: float,
    startup_errors: StartupErrors,
    on_join: Callable[[], None],
    *,
    may_lose_nodes: bool = False,
) -> None:
    """Runs this node's Ray processes until the first node closes the connection. Raises RunFailed.

    `on_join` is called after joining the first node; from then on this node waits for its end. With `may_lose_nodes`
    Slurm keeps the job when a node is lost: raises FirstNodeLost if that is the first one.
    """
    key_file = _key_file(run.cluster)
    connection = join(_rendezvous_file(run, allocation), key_file, allocation.node, wait_seconds, startup_errors.check)
    on_join()
    order = connection.receive(None)
    if order is None or order.get("end"):
        startup_errors.leave()
        _report_end(connection)
        return
    startup_errors.connected()
    use_token(key_file)
    try:
        with node_log(run, allocation).open("ab") as log:
            ray = RayNode(allocation, order["own"], order["ray"], log)
            try:
                ray.start()
                connection.send(up=True)
                in_order = _keep_running(ray, connection, allocation)
            finally:
                ray.end()
        if may_lose_nodes and not in_order:
            _wait_for_removal(connection, allocation)
    except FirstNodeLost:
        raise
    except (LauncherError, OSError) as error:
        with suppress(OSError):
            connection.send(failed=str(error), code=code_of(error))
        raise RunFailed(str(error), code=code_of(error)) from None
    finally:
        # After the reason of a failure, which the first node waits for.
        _report_end(connection)


def _report_end(connection: Connection) -> None:
    with suppress(OSError):
        connection.send(ended=True)


def _keep_running(ray: RayNode, connection: Connection, allocation: Allocation) -> bool:
    """Runs Ray until the first node closes the connection. After a network failure Ray ends: starts it again.

    Returns whether the first node sent that it ends. Raises FirstNodeLost if Slurm has removed it from the job.
    """
    asked, every = time.monotonic(), max(_ASK_SECONDS, allocation.nodes / _ASKS_PER_SECOND)
    while True:
        if connection.readable(_CHECK_SECONDS):
            message = connection.receive(None)
            if message is None or message.get("end"):
                return message is not None
        # A host without power closes no connection, and Ray may take many minutes to notice.
        if time.monotonic() - asked >= every:
            asked = time.monotonic()
            if not connection.peer_host_answers():
                _check_first_node(allocation)
        if ray.ended():
            _check_first_node(allocation)
            ray.start_again()


def _wait_for_removal(connection: Connection, allocation: Allocation) -> None:
    """Raises FirstNodeLost when Slurm removes the first node from the job; returns if its host still answers."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _REMOVAL_SECONDS:
        _check_first_node(allocation)
        # A host that shuts down answers for a while.
        if connection.peer_host_answers() and waited >= _SHUTDOWN_SECONDS:
            return
        time.sleep(_CHECK_SECONDS)


def _check_first_node(allocation: Allocation) -> None:
    """Raises FirstNodeLost if Slurm has removed the first node from the job, which --no-kill keeps alive."""
    present = expand_hosts(slurm_job_hosts(allocation.job_id) or "")
    if set(present) & set(allocation.hosts) and allocation.hosts[0] not in present:
        message = f"the first node of the job ({allocation.hosts[0]}) is lost, which carries out the run"
        raise FirstNodeLost(message, present[0] == allocation.hosts[allocation.node])


def node_log(run: RunDir, allocation: Allocation) -> Path:
    """The log file of a node's Ray processes."""
    log = _node_log(run, allocation.node, socket.gethostname())
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def _node_log(run: RunDir, node: int, host: str) -> Path:
    return run.node_logs(node, host) / "node.log"


def _start_others(run: RunDir, nodes: list[JoinedNode], address: str, ray_address: str) -> None:
    """Makes all other nodes start Ray, in parallel. Raises RunFailed, naming the first that fails."""
    for node in nodes:
        # The missing answer below reports a lost node.
        with suppress(OSError):
            node.connection.send(ray=ray_address, own=node.reached[address])
    for node in nodes:
        try:
            answer = node.connection.receive(_STARTED_SECONDS)
        except TimeoutError:
            answer = {"failed": f"no answer within {_STARTED_SECONDS:.0f} s"}
        if not (answer or {}).get("up"):
            reason = (answer or {"failed": "its task ended"})["failed"]
            code = known_code((answer or {}).get("code")) or FailureCode.NODE_LOST
            raise RunFailed(f"{_not_up(node.node_rank, node.host, reason)}\n{_log_end(run, node)}", code=code)


def _check_all_joined(allocation: Allocation, nodes: list[JoinedNode], wait_seconds: float) -> None:
    joined = {0, *(node.node_rank for node in nodes)}
    missing = [(node, host) for node, host in enumerate(allocation.hosts) if node not in joined]
    if missing:
        reason = f"it did not connect within {wait_seconds:.0f} s; see the output of the batch job"
        message = "\n".join(_not_up(node, host, reason) for node, host in missing)
        raise RunFailed(message, code=FailureCode.TIMEOUT)


def _not_up(node: int, host: str, reason: str) -> str:
    return f"node {node} ({host}) did not come up: {reason}"


def _log_end(run: RunDir, node: JoinedNode) -> str:
    """The end of a node's log. Another host with the same node rank before a requeue has a different log."""
    log = _node_log(run, node.node_rank, node.host)
    lines = last_lines(log, _LOG_LINES)
    if not lines:
        return f"  {log} is empty: see the output of the batch job"
    return "\n".join([f"  the end of {log}:", *(f"    {line}" for line in lines)])


def _key_file(folder: Path) -> Path:
    return folder / "key"


def _rendezvous_file(run: RunDir, allocation: Allocation) -> Path:
    """The file of this start of the job, not to be confused with that of an earlier start."""
    return run.cluster / f"rendezvous-{allocation.start}.json"

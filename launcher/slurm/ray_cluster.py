"""An allocation's own Ray, brought up from its first node: the nodes meet, and each starts its part."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.errors import FailureCode, LauncherError, RunFailed, code_of, known_code
from launcher.files import last_lines
from launcher.fleet.network import LOOPBACK
from launcher.fleet.ray_settings import LOOPBACK_ONLY, use_token, write_token
from launcher.run_dir import RunDir
from launcher.slurm.allocation import Allocation
from launcher.slurm.ray_node import OwnRay
from launcher.slurm.rendezvous import Guest, Meeting, attend, common_address
from launcher.slurm.startup_errors import Refusals

_STARTED_SECONDS = 300.0
_LOG_LINES = 20


@contextmanager
def first_node(allocation: Allocation, run: RunDir, wait_seconds: float, refusals: Refusals) -> Iterator[None]:
    """Has a Ray over all nodes inside the block, joined by whoever asks for the environment's. Raises RunFailed.

    At the end, however it comes, the other nodes are told, and everything that was started here is ended.
    """
    folder = run.cluster
    folder.mkdir(exist_ok=True)
    key_file = _key_file(folder)
    write_token(key_file)
    meeting = Meeting(_meeting_file(run, allocation), key_file.read_text(), allocation.nodes - 1)
    ray: OwnRay | None = None
    # Closed last of all: Ray writes to it until its end.
    with node_log(run, allocation).open("ab") as log:
        try:
            meeting.publish()
            guests = meeting.wait(wait_seconds, refusals.check)
            _check_all_came(allocation, guests, wait_seconds)
            if not guests:
                os.environ.update(LOOPBACK_ONLY)
            address = common_address(guests) if guests else LOOPBACK
            use_token(key_file)
            ray = OwnRay(allocation, address, None, log)
            ray.start()
            refusals.met()
            _start_others(run, guests, address, ray.address)
            os.environ["RAY_ADDRESS"] = ray.address
            yield
        finally:
            meeting.close()
            if ray is not None:
                ray.end()
            shutil.rmtree(folder, ignore_errors=True)


def other_node(
    allocation: Allocation, run: RunDir, wait_seconds: float, refusals: Refusals, attended: Callable[[], None]
) -> None:
    """Starts this node's part of the Ray and holds it until the first node lets go. Raises RunFailed.

    `attended` is called once the first node is there, whose end this one waits for.
    """
    key_file = _key_file(run.cluster)
    line = attend(_meeting_file(run, allocation), key_file, allocation.node, wait_seconds, refusals.check)
    attended()
    order = line.receive(None)
    if order is None:
        refusals.follow()
        return
    refusals.met()
    use_token(key_file)
    try:
        with node_log(run, allocation).open("ab") as log:
            ray = OwnRay(allocation, order["own"], order["ray"], log)
            try:
                ray.start()
                line.send(up=True)
                line.receive(None)
            finally:
                ray.end()
    except (LauncherError, OSError) as error:
        with suppress(OSError):
            line.send(failed=str(error), code=code_of(error))
        raise RunFailed(str(error), code=code_of(error)) from None


def node_log(run: RunDir, allocation: Allocation) -> Path:
    """Where a node's Ray writes what it has to say."""
    log = _node_log(run, allocation.node, socket.gethostname())
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def _node_log(run: RunDir, node: int, host: str) -> Path:
    return run.node_logs(node, host) / "node.log"


def _start_others(run: RunDir, guests: list[Guest], address: str, ray_address: str) -> None:
    """Has every other node start its part, all at once. Raises RunFailed, naming the first that does not."""
    for guest in guests:
        # One that is gone already shows in what it answers.
        with suppress(OSError):
            guest.line.send(ray=ray_address, own=guest.reached[address])
    for guest in guests:
        try:
            answer = guest.line.receive(_STARTED_SECONDS)
        except TimeoutError:
            answer = {"failed": f"no answer within {_STARTED_SECONDS:.0f} s"}
        if not (answer or {}).get("up"):
            reason = (answer or {"failed": "its task ended"})["failed"]
            code = known_code((answer or {}).get("code")) or FailureCode.NODE_LOST
            raise RunFailed(f"{_not_up(guest.node, guest.host, reason)}\n{_log_end(run, guest)}", code=code)


def _check_all_came(allocation: Allocation, guests: list[Guest], wait_seconds: float) -> None:
    came = {0, *(guest.node for guest in guests)}
    missing = [(node, host) for node, host in enumerate(allocation.hosts) if node not in came]
    if missing:
        reason = f"it did not answer within {wait_seconds:.0f} s; see the batch job's own output"
        message = "\n".join(_not_up(node, host, reason) for node, host in missing)
        raise RunFailed(message, code=FailureCode.TIMEOUT)


def _not_up(node: int, host: str, reason: str) -> str:
    return f"node {node} ({host}) did not come up: {reason}"


def _log_end(run: RunDir, guest: Guest) -> str:
    """What a node that came has written. Another host that was this node before a requeue has a log of its own."""
    log = _node_log(run, guest.node, guest.host)
    lines = last_lines(log, _LOG_LINES)
    if not lines:
        return f"  it wrote nothing to {log}: see the batch job's own output"
    return "\n".join([f"  the end of {log}:", *(f"    {line}" for line in lines)])


def _key_file(folder: Path) -> Path:
    return folder / "key"


def _meeting_file(run: RunDir, allocation: Allocation) -> Path:
    """Of this start of the job: what an earlier one left behind must not be taken for it."""
    return run.cluster / f"meeting-{allocation.start}.json"

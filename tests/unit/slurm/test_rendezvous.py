"""How nodes find each other, with real connections on this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import Problem, RequestError, RunFailed
from launcher.fleet.network import ProbePort, free_ports, interface_of, own_addresses, reach
from launcher.run_dir import RunDir
from launcher.slurm import rendezvous
from launcher.slurm.allocation import Allocation
from launcher.slurm.ray_cluster import _start_others
from launcher.slurm.rendezvous import Connection, JoinedNode, RendezvousServer, common_address, join
from launcher.slurm.startup_errors import StartupErrors
from tests.time_limit import TIME_LIMIT_SECONDS

KEY = "ab" * 32
ALLOCATION = Allocation("77", 0, 0, ("h1", "h2", "h3"), cpus=4, gpus=0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rendezvous.json"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text(KEY)
    return tmp_path / "key"


@pytest.fixture
def first(file: Path) -> Iterator[RendezvousServer]:
    first = RendezvousServer(file, KEY, others=2)
    yield first
    first.close()


def test_nodes_join_exchange_messages_and_notice_the_end_of_the_first_one(
    file: Path, key: Path, first: RendezvousServer
) -> None:
    with ThreadPoolExecutor() as pool:
        # They wait for the file, and join in any order.
        joining = [pool.submit(join, file, key, node, TIME_LIMIT_SECONDS) for node in (2, 1)]
        first.publish()
        nodes = first.wait(TIME_LIMIT_SECONDS)
        connections = {node: future.result() for node, future in zip((2, 1), joining, strict=True)}
    assert [node.node_rank for node in nodes] == [1, 2]
    address = common_address(nodes)
    assert address in own_addresses()
    assert nodes[0].reached[address] in own_addresses()
    nodes[1].connection.send(ray="there")
    assert connections[2].receive(TIME_LIMIT_SECONDS) == {"ray": "there"}
    connections[1].send(up=True)
    assert nodes[0].connection.receive(TIME_LIMIT_SECONDS) == {"up": True}
    first.close()
    assert [connections[node].receive(TIME_LIMIT_SECONDS) for node in (1, 2)] == [None, None]
    assert not file.exists()


def test_a_node_that_does_not_report_its_end_is_lost(file: Path, key: Path, first: RendezvousServer) -> None:
    first.publish()
    one, two = (join(file, key, node, TIME_LIMIT_SECONDS) for node in (1, 2))
    assert len(first.wait(TIME_LIMIT_SECONDS)) == 2
    with ThreadPoolExecutor() as pool:
        lost = pool.submit(first.wait_for_ends, TIME_LIMIT_SECONDS)
        assert [one.receive(TIME_LIMIT_SECONDS) for _ in range(2)] == [{"end": True}, None]
        one.send(failed="its Ray ended")
        one.send(ended=True)
        two.close()
        assert [node.node_rank for node in lost.result(TIME_LIMIT_SECONDS)] == [2]


def test_a_node_that_does_not_answer_is_lost(file: Path, key: Path, first: RendezvousServer) -> None:
    first.publish()
    one = join(file, key, 1, TIME_LIMIT_SECONDS)
    two = join(file, key, 2, TIME_LIMIT_SECONDS)
    assert len(first.wait(TIME_LIMIT_SECONDS)) == 2
    two.send(ended=True)
    assert [node.node_rank for node in first.wait_for_ends(0.5)] == [1]
    one.close()


def test_a_node_without_the_key_cannot_join(file: Path, key: Path, first: RendezvousServer) -> None:
    first.publish()
    key.write_text("another")
    with pytest.raises(RunFailed, match="cannot connect to the first node"):
        join(file, key, 1, 5.0)
    assert first.wait(0.0) == []


def test_unreachable_addresses_are_skipped(file: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 5.0)
    first = RendezvousServer(file, KEY, others=1)
    first.publish()
    published = json.loads(file.read_text())
    # 192.0.2.0/24 is reserved for documentation: nobody answers there.
    file.write_text(json.dumps({**published, "addresses": ["192.0.2.77", *published["addresses"]]}))
    join(file, key, 1, TIME_LIMIT_SECONDS)
    (node,) = first.wait(TIME_LIMIT_SECONDS)
    first.close()
    assert "192.0.2.77" not in node.reached
    assert set(node.reached) == set(published["addresses"])


def test_a_missing_file_is_named(file: Path, key: Path) -> None:
    with pytest.raises(
        RunFailed, match=r"rendezvous.json did not appear within 0 s: check that output_dir is on storage"
    ):
        join(file, key, 1, 0.3)


def test_an_unreadable_file_is_reported_without_a_traceback(file: Path, key: Path) -> None:
    """A network file system may report ESTALE; a folder in place of the file gives a similar error."""
    file.mkdir()
    with pytest.raises(RunFailed, match=r"rendezvous.json could not be read \(Is a directory\) within 0 s"):
        join(file, key, 1, 0.3)


def startup_errors(folder: Path, node: int, **start: object) -> StartupErrors:
    return StartupErrors(RunDir(folder / "runs/tiny-slurm-77"), replace(ALLOCATION, node=node, **start))


def fails(own: StartupErrors, error: BaseException) -> None:
    with pytest.raises(type(error)), own.reported():
        raise error


def test_a_failing_node_ends_the_waiting_of_all_and_leaves_no_files(
    file: Path, key: Path, first: RendezvousServer, tmp_path: Path
) -> None:
    zero, one, two = (startup_errors(tmp_path, node) for node in range(3))
    with ThreadPoolExecutor() as pool:
        waiting_first = pool.submit(first.wait, 600.0, zero.check)
        # The first node never publishes here: it may have failed before.
        joining = pool.submit(join, file, key, 1, 600.0, one.check)
        fails(two, RequestError(Problem("no folder /models/llama", key="model.name_or_path")))
        for waiting in (waiting_first, joining):
            with pytest.raises(
                RunFailed, match=r"node 2 \(.+\) failed to start: model.name_or_path: no folder /models"
            ):
                waiting.result(TIME_LIMIT_SECONDS)
            error = waiting.exception()
            assert isinstance(error, RunFailed) and error.code == "user_error"
    fails(zero, waiting_first.exception() or KeyError())
    # A node that ended because of another one is not listed.
    with pytest.raises(RunFailed) as raised:
        one.check()
    assert str(raised.value).count("failed to start") == 1
    fails(one, joining.exception() or KeyError())
    assert list((tmp_path / "runs").iterdir()) == []


def test_startup_errors_of_an_earlier_start_are_ignored(tmp_path: Path) -> None:
    fails(startup_errors(tmp_path, 2), SystemExit(143))
    with pytest.raises(RunFailed, match=r"node 2 \(.+\) failed to start: it was interrupted"):
        startup_errors(tmp_path, 1).check()
    for start in ({"restart": 1}, {"step": "1"}, {"job_id": "7"}):
        own = startup_errors(tmp_path, 0, **start)
        own.check()
    own.connected()
    fails(own, RunFailed("a rank died"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_nodes_without_a_common_network_are_named() -> None:
    connection = Connection.__new__(Connection)
    nodes = [
        JoinedNode(1, "h2", {"10.0.0.1": "10.0.0.2"}, connection),
        JoinedNode(2, "h3", {"10.1.0.1": "10.1.0.3"}, connection),
    ]
    with pytest.raises(RunFailed, match=r"h2 through 10.0.0.1; h3 through 10.1.0.1"):
        common_address(nodes)


def test_a_node_that_joined_and_failed_is_reported_with_its_own_log(tmp_path: Path) -> None:
    """Before the job was requeued, another host had this node rank."""
    run = RunDir(tmp_path)
    for host in ("h2", "h3"):
        run.node_logs(1, host).mkdir(parents=True)
        (run.node_logs(1, host) / "node.log").write_text(f"written on {host}\n")
    ours, theirs = map(Connection, socket.socketpair())
    theirs.send(failed="no free port", code="network")
    with pytest.raises(RunFailed) as raised:
        _start_others(run, [JoinedNode(1, "h3", {"10.0.0.1": "10.0.0.3"}, ours)], "10.0.0.1", "10.0.0.1:7000")
    assert theirs.receive(TIME_LIMIT_SECONDS) == {"ray": "10.0.0.1:7000", "own": "10.0.0.3"}
    first, *log = str(raised.value).splitlines()
    assert (first, raised.value.code) == ("node 1 (h3) did not come up: no free port", "network")
    assert log == [f"  the end of {tmp_path}/logs/node-1-h3/node.log:", "    written on h3"]


def test_the_probe_port_shows_the_interface_that_reaches_it() -> None:
    probe_port = ProbePort()
    reached = reach("127.0.0.1", probe_port.port, 5.0)
    assert (reached.address, reached.interface) == ("127.0.0.1", "lo")
    probe_port.close()
    with pytest.raises(OSError):
        reach("127.0.0.1", probe_port.port, 1.0)
    assert interface_of("192.0.2.77") is None


def test_two_jobs_get_different_free_ports() -> None:
    one, other = free_ports("job-1"), free_ports("job-2")
    ports = [next(one) for _ in range(9)]
    assert len(set(ports)) == 9
    assert not set(ports) & {next(other) for _ in range(9)}
    assert [next(again) for again in [free_ports("job-1")] for _ in range(9)] == ports
    with socket.create_server(("", ports[0])):
        assert next(free_ports("job-1")) == ports[1]

"""How nodes find each other, over real connections on this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import Problem, RequestError, RunFailed
from launcher.fleet.network import Doorbell, free_ports, interface_of, own_addresses, reach
from launcher.run_dir import RunDir
from launcher.slurm import rendezvous
from launcher.slurm.allocation import Allocation
from launcher.slurm.ray_cluster import _start_others
from launcher.slurm.rendezvous import Guest, Line, Meeting, attend, common_address
from launcher.slurm.startup_errors import Refusals
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
def first(file: Path) -> Iterator[Meeting]:
    first = Meeting(file, KEY, others=2)
    yield first
    first.close()


def test_nodes_meet_talk_and_see_the_first_one_go(file: Path, key: Path, first: Meeting) -> None:
    with ThreadPoolExecutor() as pool:
        # They wait for the file, and come in any order.
        coming = [pool.submit(attend, file, key, node, TIME_LIMIT_SECONDS) for node in (2, 1)]
        first.publish()
        guests = first.wait(TIME_LIMIT_SECONDS)
        lines = {node: future.result() for node, future in zip((2, 1), coming, strict=True)}
    assert [guest.node for guest in guests] == [1, 2]
    address = common_address(guests)
    assert address in own_addresses()
    assert guests[0].reached[address] in own_addresses()
    guests[1].line.send(ray="there")
    assert lines[2].receive(TIME_LIMIT_SECONDS) == {"ray": "there"}
    lines[1].send(up=True)
    assert guests[0].line.receive(TIME_LIMIT_SECONDS) == {"up": True}
    first.close()
    assert [lines[node].receive(TIME_LIMIT_SECONDS) for node in (1, 2)] == [None, None]
    assert not file.exists()


def test_who_has_not_the_key_is_not_let_in(file: Path, key: Path, first: Meeting) -> None:
    first.publish()
    key.write_text("another")
    with pytest.raises(RunFailed, match="no way to the first node"):
        attend(file, key, 1, 5.0)
    assert first.wait(0.0) == []


def test_addresses_that_lead_nowhere_are_passed_over(file: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 5.0)
    first = Meeting(file, KEY, others=1)
    first.publish()
    invitation = json.loads(file.read_text())
    # 192.0.2.0/24 is kept for documentation: nobody answers there.
    file.write_text(json.dumps({**invitation, "addresses": ["192.0.2.77", *invitation["addresses"]]}))
    attend(file, key, 1, TIME_LIMIT_SECONDS)
    (guest,) = first.wait(TIME_LIMIT_SECONDS)
    first.close()
    assert "192.0.2.77" not in guest.reached
    assert set(guest.reached) == set(invitation["addresses"])


def test_a_file_that_never_comes_is_named(file: Path, key: Path) -> None:
    with pytest.raises(RunFailed, match=r"rendezvous.json did not appear within 0 s: is output_dir on storage"):
        attend(file, key, 1, 0.3)


def test_a_file_that_cannot_be_read_is_told_without_a_traceback(file: Path, key: Path) -> None:
    """A network file system says ESTALE for a while; a folder in the file's place is another error of that kind."""
    file.mkdir()
    with pytest.raises(RunFailed, match=r"rendezvous.json could not be read \(Is a directory\) within 0 s"):
        attend(file, key, 1, 0.3)


def refusals(folder: Path, node: int, **start: object) -> Refusals:
    return Refusals(RunDir(folder / "runs/tiny-slurm-77"), replace(ALLOCATION, node=node, **start))


def leaves(own: Refusals, error: BaseException) -> None:
    with pytest.raises(type(error)), own.told():
        raise error


def test_a_node_that_refuses_ends_the_waiting_of_all_and_leaves_nothing_behind(
    file: Path, key: Path, first: Meeting, tmp_path: Path
) -> None:
    zero, one, two = (refusals(tmp_path, node) for node in range(3))
    with ThreadPoolExecutor() as pool:
        hosting = pool.submit(first.wait, 600.0, zero.check)
        # The first node never publishes here: it may have refused before it could.
        coming = pool.submit(attend, file, key, 1, 600.0, one.check)
        leaves(two, RequestError(Problem("no folder /models/llama", key="model.name_or_path")))
        for waiting in (hosting, coming):
            with pytest.raises(RunFailed, match=r"node 2 \(.+\) refused: model.name_or_path: no folder /models/llama"):
                waiting.result(TIME_LIMIT_SECONDS)
            refused = waiting.exception()
            assert isinstance(refused, RunFailed) and refused.code == "user_error"
    leaves(zero, hosting.exception() or KeyError())
    # Who only follows is not told of as a reason.
    with pytest.raises(RunFailed) as told:
        one.check()
    assert str(told.value).count("refused") == 1
    leaves(one, coming.exception() or KeyError())
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_an_earlier_start_left_behind_is_not_taken_for_this_one(tmp_path: Path) -> None:
    leaves(refusals(tmp_path, 2), SystemExit(143))
    with pytest.raises(RunFailed, match=r"node 2 \(.+\) refused: it was asked to end"):
        refusals(tmp_path, 1).check()
    for start in ({"restart": 1}, {"step": "1"}, {"job_id": "7"}):
        own = refusals(tmp_path, 0, **start)
        own.check()
    own.met()
    leaves(own, RunFailed("a rank died"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_nodes_without_a_network_in_common_are_named() -> None:
    line = Line.__new__(Line)
    guests = [Guest(1, "h2", {"10.0.0.1": "10.0.0.2"}, line), Guest(2, "h3", {"10.1.0.1": "10.1.0.3"}, line)]
    with pytest.raises(RunFailed, match=r"h2 by 10.0.0.1; h3 by 10.1.0.1"):
        common_address(guests)


def test_a_node_that_came_and_failed_is_told_with_the_log_of_its_own_host(tmp_path: Path) -> None:
    """Another host had been this node before the job was requeued."""
    run = RunDir(tmp_path)
    for host in ("h2", "h3"):
        run.node_logs(1, host).mkdir(parents=True)
        (run.node_logs(1, host) / "node.log").write_text(f"written on {host}\n")
    ours, theirs = map(Line, socket.socketpair())
    theirs.send(failed="no free port", code="network")
    with pytest.raises(RunFailed) as told:
        _start_others(run, [Guest(1, "h3", {"10.0.0.1": "10.0.0.3"}, ours)], "10.0.0.1", "10.0.0.1:7000")
    assert theirs.receive(TIME_LIMIT_SECONDS) == {"ray": "10.0.0.1:7000", "own": "10.0.0.3"}
    first, *log = str(told.value).splitlines()
    assert (first, told.value.code) == ("node 1 (h3) did not come up: no free port", "network")
    assert log == [f"  the end of {tmp_path}/logs/node-1-h3/node.log:", "    written on h3"]


def test_a_doorbell_shows_the_interface_by_which_it_is_reached() -> None:
    doorbell = Doorbell()
    reached = reach("127.0.0.1", doorbell.port, 5.0)
    assert (reached.address, reached.interface) == ("127.0.0.1", "lo")
    doorbell.close()
    with pytest.raises(OSError):
        reach("127.0.0.1", doorbell.port, 1.0)
    assert interface_of("192.0.2.77") is None


def test_ports_of_two_jobs_are_free_and_not_the_same() -> None:
    one, other = free_ports("job-1"), free_ports("job-2")
    ports = [next(one) for _ in range(9)]
    assert len(set(ports)) == 9
    assert not set(ports) & {next(other) for _ in range(9)}
    assert [next(again) for again in [free_ports("job-1")] for _ in range(9)] == ports
    with socket.create_server(("", ports[0])):
        assert next(free_ports("job-1")) == ports[1]

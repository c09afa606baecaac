"""How nodes find each other, over real connections on this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import RunFailed
from launcher.fleet import meeting
from launcher.fleet.meeting import Guest, Line, Meeting, attend, common_address
from launcher.fleet.network import Doorbell, free_ports, interface_of, own_addresses, reach

KEY = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "meeting.json"


@pytest.fixture
def first(file: Path) -> Iterator[Meeting]:
    first = Meeting(file, KEY, others=2)
    yield first
    first.close()


def test_nodes_meet_talk_and_see_the_first_one_go(file: Path, first: Meeting) -> None:
    with ThreadPoolExecutor() as pool:
        # They wait for the file, and come in any order.
        coming = [pool.submit(attend, file, lambda: KEY, node, 20.0) for node in (2, 1)]
        first.publish()
        guests = first.wait(20.0)
        lines = {node: future.result() for node, future in zip((2, 1), coming, strict=True)}
    assert [guest.node for guest in guests] == [1, 2]
    address = common_address(guests)
    assert address in own_addresses()
    assert guests[0].reached[address] in own_addresses()
    guests[1].line.send(ray="there")
    assert lines[2].receive(5.0) == {"ray": "there"}
    lines[1].send(up=True)
    assert guests[0].line.receive(5.0) == {"up": True}
    guests[0].line.close()
    assert lines[1].receive(5.0) is None
    first.close()
    assert not file.exists()


def test_who_has_not_the_key_is_not_let_in(file: Path, first: Meeting) -> None:
    first.publish()
    with pytest.raises(RunFailed, match="no way to the first node"):
        attend(file, lambda: "another", 1, 5.0)
    assert first.wait(0.0) == []


def test_addresses_that_lead_nowhere_are_passed_over(
    file: Path, first: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_CONNECT_SECONDS", 1.0)
    first.publish()
    invitation = json.loads(file.read_text())
    # 192.0.2.0/24 is kept for documentation: nobody answers there.
    file.write_text(json.dumps({**invitation, "addresses": ["192.0.2.77", *invitation["addresses"]]}))
    attend(file, lambda: KEY, 1, 20.0)
    (guest,) = first.wait(0.5)
    assert "192.0.2.77" not in guest.reached
    assert set(guest.reached) == set(invitation["addresses"])


def test_a_file_that_never_comes_is_named(file: Path) -> None:
    with pytest.raises(RunFailed, match=r"meeting.json did not appear within 0 s: is output_dir on storage"):
        attend(file, lambda: KEY, 1, 0.3)


def test_nodes_without_a_network_in_common_are_named() -> None:
    line = Line.__new__(Line)
    guests = [Guest(1, "h2", {"10.0.0.1": "10.0.0.2"}, line), Guest(2, "h3", {"10.1.0.1": "10.1.0.3"}, line)]
    with pytest.raises(RunFailed, match=r"h2 by 10.0.0.1; h3 by 10.1.0.1"):
        common_address(guests)


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

"""Ray's head process is lost when nothing listens on its port any more."""

from __future__ import annotations

import socket

import pytest

from launcher.fleet import ray_head
from launcher.fleet.ray_head import RayHead


@pytest.fixture(autouse=True)
def check_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "_CHECK_SECONDS", 0.0)


def test_a_head_is_lost_after_several_failed_attempts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        head = RayHead(address, patience_seconds=0.0)
        assert [head.gone() for _ in range(5)] == [False] * 5
    assert [head.gone() for _ in range(4)] == [False, False, True, True]


def test_a_head_that_comes_back_is_not_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    head = RayHead(f"127.0.0.1:{port}", patience_seconds=0.0)
    assert [head.gone() for _ in range(2)] == [False, False]
    with socket.create_server(("127.0.0.1", port)):
        assert not head.gone()
    assert [head.gone() for _ in range(3)] == [False, False, True]


def test_a_head_has_time_to_come_back() -> None:
    head = RayHead("127.0.0.1:1", patience_seconds=3600.0)
    assert not any(head.gone() for _ in range(10))

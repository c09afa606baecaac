"""Nodes that do not answer: reported first, lost later."""

from __future__ import annotations

import pytest

from launcher.fleet.answer_times import AnswerTimes


@pytest.fixture
def notes() -> list[str]:
    return []


HOSTS = ["h0", "h1"]


def test_a_node_that_does_not_answer_is_reported_after_five_seconds_and_lost_after_twenty(notes: list[str]) -> None:
    times = AnswerTimes(notes.append)
    times.begin(2)
    lost: list[tuple[int, list[int]]] = []
    for second in range(30):
        times.answered(0)
        if found := times.check(100.0 + second, HOSTS):
            lost.append((second, found))
    assert lost == [(20, [1])] and times.lost == {1}
    assert [note.strip() for note in notes] == ["node 1 (h1) has not answered for 5 s"]


def test_a_node_that_answers_again_is_not_lost(notes: list[str]) -> None:
    times = AnswerTimes(notes.append)
    times.begin(1)
    for second in range(60):
        if second % 15 == 0:
            times.answered(0)
        assert times.check(float(second), HOSTS) == []
    assert notes[1].strip() == "node 0 (h0) answers again"


def test_a_pause_of_the_launcher_is_not_counted(notes: list[str]) -> None:
    """A suspended process receives no answers."""
    times = AnswerTimes(notes.append)
    times.begin(1)
    assert times.check(0.0, HOSTS) == times.check(3600.0, HOSTS) == []
    assert notes == []

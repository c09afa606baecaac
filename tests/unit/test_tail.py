"""Following a growing file of JSON lines."""

from __future__ import annotations

from pathlib import Path

from launcher.tail import Tail


def test_damaged_lines_are_passed_over_by_those_who_follow(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"update": 0}\n{"upd\x00\n[1]\n\xff\n{"update": 1}\n{"upd')
    tail = Tail(file)
    assert tail.new() == [{"update": 0}, {"update": 1}]
    with file.open("a") as more:
        more.write('ate": 2}\n')
    assert tail.new() == [{"update": 2}]

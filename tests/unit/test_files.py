"""JSON lines files: damaged lines are skipped and counted, and lines that are set aside are never lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import files
from launcher.files import Tail, append_line, parse_lines, read_json, read_lines, replace_folder, set_aside

GARBAGE = [
    b'{"update": 3, "lo',  # torn
    b'{"update": 3, "lo{"update": 4}',  # torn, followed by the next record
    b"[1, 2]",
    b'"text"',
    b"NULL",
    b"\x00" * 40,
    b"\xff\xfe\x80 binary",
    b"[" * 100_000,
    b"9" * 10_000,
]


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [{"update": number, "loss": 1.5} for number in range(len(GARBAGE))]
    with path.open("wb") as file:
        for record, garbage in zip(whole, GARBAGE, strict=True):
            file.write(garbage + b"\n" + json.dumps(record).encode() + b"\n\n")
    damaged: list[bytes] = []
    assert list(read_lines(path, damaged.append)) == whole
    assert [line.rstrip(b"\n") for line in damaged] == GARBAGE
    assert Tail(path).new() == whole


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(), max_size=5))
def test_arbitrary_bytes_do_not_stop_the_reader(garbage: list[bytes], numbers: list[int]) -> None:
    lines = [b.replace(b"\n", b"") for b in garbage] + [json.dumps({"n": n}).encode() for n in numbers]
    found = [record["n"] for record in parse_lines(lines) if set(record) == {"n"}]
    assert found[len(found) - len(numbers) :] == numbers


@pytest.mark.parametrize(
    ("tail", "found"),
    [
        (b'{"update": 1, "lo', [0, 2]),
        (b'{"update": 1}', [0, 1, 2]),  # only the newline is missing
        (b"\x00\x00\x00", [0, 2]),
        (b"", [0, 2]),
    ],
)
def test_an_append_starts_on_a_new_line(tmp_path: Path, tail: bytes, found: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"update": 0})
    with path.open("ab") as file:
        file.write(tail)
    append_line(path, {"update": 2})
    assert [line["update"] for line in read_lines(path)] == found
    assert path.read_bytes().count(b"\n") == (3 if tail else 2)


def test_a_partial_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a nearly full disk a write may be partial."""
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
    append_line(tmp_path / "x.jsonl", {"text": "x" * 50})
    assert list(read_lines(tmp_path / "x.jsonl")) == [{"text": "x" * 50}]


def test_the_line_after_a_failed_partial_write_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "x.jsonl", os.write
    append_line(path, {"update": 0})
    room = [10]

    def nearly_full(descriptor: int, data: memoryview) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, bytes(data)[: room[0]])
        room[0] -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", nearly_full)
        with pytest.raises(OSError, match="No space left"):
            append_line(path, {"update": 1, "text": "x" * 50})
    append_line(path, {"update": 2})
    damaged: list[bytes] = []
    assert [line["update"] for line in read_lines(path, damaged.append)] == [0, 2]
    assert len(damaged) == 1


def lines_of(path: Path) -> list[int]:
    return [line["update"] for line in read_lines(path)]


class Crash(BaseException):
    """The process is killed here."""


@settings(deadline=None, max_examples=60)
@given(
    last=st.integers(0, 6),
    crash_at=st.integers(0, 8),
    after=st.booleans(),
    links=st.booleans(),
    torn=st.sampled_from([b"", b'{"update": 9, "l', b"\xff\xff\n", b'{"update": 6}']),
)
def test_a_crash_while_lines_are_set_aside_loses_no_line(
    tmp_path_factory: pytest.TempPathFactory, last: int, crash_at: int, after: bool, links: bool, torn: bytes
) -> None:
    """Crashes before or after any step: the file is intact, no line is lost, and a second call completes the work.

    With and without hard links, which not every file system has.
    """
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    original = b"".join(json.dumps({"update": n}).encode() + b"\n" for n in range(6)) + torn
    path.write_bytes(original)
    steps = [0]

    def step(function, refuse: bool = False):
        def called(*args, **kwargs):
            steps[0] += 1
            if steps[0] == crash_at and not after:
                raise Crash
            if refuse:
                raise OSError(errno.EPERM, "Operation not permitted")
            result = function(*args, **kwargs)
            if steps[0] == crash_at and after:
                raise Crash
            return result

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "link", step(os.link, refuse=not links))
        patch.setattr(files.os, "fsync", step(os.fsync))
        patch.setattr(Path, "replace", step(Path.replace))
        patch.setattr(Path, "open", step(Path.open))
        with contextlib.suppress(Crash):
            set_aside(path, lambda line: line["update"] < last)
    wanted = b"".join(json.dumps({"update": n}, separators=(",", ":")).encode() + b"\n" for n in range(min(last, 6)))
    undone = sorted(path.parent.glob("metrics.undone-*.jsonl"))
    now = path.read_bytes()
    assert now in (original, wanted)
    assert now == original or [each.read_bytes() for each in undone] == [original]

    set_aside(path, lambda line: line["update"] < last)
    undone = sorted(path.parent.glob("metrics.undone-*.jsonl"))
    assert lines_of(path) == list(range(min(last, 6)))
    assert [each.read_bytes() for each in undone] in ([], [original])


def test_lines_set_aside_again_get_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "metrics.undone-7.jsonl").write_text("{}\n")
    for update in range(3):
        append_line(path, {"update": update})
    assert set_aside(path, lambda line: line["update"] < 2) == tmp_path / "metrics.undone-8.jsonl"
    assert set_aside(path, lambda line: line["update"] < 1) == tmp_path / "metrics.undone-9.jsonl"
    assert set_aside(path, lambda line: line["update"] < 1) is None
    assert set_aside(tmp_path / "missing.jsonl", lambda _: False) is None


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a"', b"\xff", b"\x00" * 9, b"[" * 100_000])
def test_a_damaged_json_file_is_read_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") is None


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["old", "old/new"]
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", tmp_path / "old")
    assert (tmp_path / "old/new").exists()


def test_damaged_lines_are_skipped_when_following_a_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"update": 0}\n{"upd\x00\n[1]\n\xff\n{"update": 1}\n{"upd')
    tail = Tail(file)
    assert tail.new() == [{"update": 0}, {"update": 1}]
    with file.open("a") as more:
        more.write('ate": 2}\n')
    assert tail.new() == [{"update": 2}]


def test_an_error_while_a_line_is_appended_names_the_file(tmp_path: Path) -> None:
    """The kernel's error of a write names none."""
    file = tmp_path / "file"
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{file}'")):
        append_line(file, {"a": 1})

"""tests/README.md lists every test file, each in the table of its folder, and no other."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def listed() -> list[str]:
    """The test files that the README's tables list, as paths in tests/."""
    folder, found = None, []
    for line in (TESTS / "README.md").read_text().splitlines():
        if line.startswith("#"):
            heading = re.fullmatch(r"#+ tests/(\S+)", line)
            folder = heading[1] if heading else None
        elif folder and (row := re.match(r"\| (test_\w+\.py) \|", line)):
            found.append(f"{folder}/{row[1]}")
    return found


def test_every_test_file_is_listed_once_and_no_other() -> None:
    there = [path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")]
    assert len(there) > 80
    assert sorted(listed()) == sorted(there)


def test_files_that_tests_share_exist() -> None:
    """Those without a folder follow one in the same cell, and are in its folder."""
    rows = re.search(r"## What tests share\n(.*?)\n## ", (TESTS / "README.md").read_text(), re.DOTALL)
    assert rows is not None
    cells = re.findall(r"^\| ([a-z]\S*(?:, \S+)*) \|", rows[1], re.MULTILINE)[1:]
    assert len(cells) > 15
    for cell in cells:
        first, *others = cell.split(", ")
        assert (TESTS / first).exists(), first
        for other in others:
            assert (TESTS / other).exists() or (TESTS / first).with_name(other).exists(), other

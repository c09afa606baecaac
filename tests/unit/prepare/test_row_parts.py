"""Parts of a data set: they have the rows of the whole file, with the same locations and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.prepare import row_parts
from launcher.prepare.json_rows import JsonFile
from launcher.prepare.row_parts import LinePart, NotLines, line_parts, packed_parts
from launcher.prepare.rows import BadFile, Row

LINE_ENDS = ("\n", "\r\n", "\n\n", "\n \t\n", " \n")
LINES = st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(LINE_ENDS)), min_size=2)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART_BYTES", 40)


def located(rows: list[Row]) -> list[tuple[dict[str, Any], Any]]:
    return [(dict(row), row.location) for row in rows]


@settings(max_examples=100, deadline=None)
@given(lines=LINES, ascii=st.booleans(), mark=st.booleans(), ended=st.booleans())
def test_parts_have_the_rows_of_the_file(
    lines: list[tuple[str, str]], ascii: bool, mark: bool, ended: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    text = "".join(json.dumps({"text": text}, ensure_ascii=ascii) + end for text, end in lines)
    file.write_bytes(("\ufeff" * mark + (text if ended else text.rstrip())).encode())
    parts = line_parts(file)
    assert parts is not None
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert located([row for part in parts for row in part.rows()]) == located(list(JsonFile(file).rows()))
    assert sum(part.count for part in parts) == len(lines)


def test_only_the_chosen_rows_of_a_part_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(f'{{"text": "{number}"}}\n\n' for number in range(5)))
    part = LinePart(file, 0, file.stat().st_size, 1, 1, 5, np.array([False, True, False, False, True]))
    assert [(row["text"], row.location.row, row.location.line) for row in part.rows()] == [("1", 2, 3), ("4", 5, 9)]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"},\n{"text": "b"}]\n',
        '{\n"text": "a"}\n{"text": "b"}\n',
        '{"version": 1, "data": [{"text": "a"}]}\n',
        '"a"\n"b"\n',
        "",
        "text,a\n",
    ],
)
def test_a_file_whose_first_line_is_not_one_of_several_objects_is_not_cut(content: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    assert line_parts(file) is None


@pytest.mark.parametrize(
    "later",
    [
        '{"text": "b"} {"text": "c"}\n{"text": "d"}\n',
        '{"text":\n"b"}\n{"text": "c"}\n',
        '{"text": "b"}\n{\n"text":\n"c"}\n',
    ],
)
def test_rows_that_are_not_one_on_each_line_are_noticed(later: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n' + later)
    parts = line_parts(file)
    assert parts is not None
    with pytest.raises((NotLines, BadFile)):
        assert [row for part in parts for row in part.rows()]


def test_packed_parts_have_the_same_rows_in_order(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(f'{{"text": "{number}", "n": [null, 1.5]}}\n' for number in range(20)))
    rows = list(JsonFile(file).rows())
    parts = list(packed_parts(iter(rows)))
    assert len(parts) > 2
    assert located([row for part in parts for row in part.rows()]) == located(rows)

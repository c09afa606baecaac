"""Reading rows: text stays text in every kind of file, and errors name the file, the row and the line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import Problem, RequestError
from launcher.prepare.read_rows import Loaded, held_out_rows, load_rows
from launcher.prepare.sources import find_data

RowList = list[dict[str, Any]]


def loaded(train: Path | str, held_out: Path | str | float | None = None, kind: str = "auto") -> Loaded:
    other = find_data(str(held_out), "data.eval") if isinstance(held_out, Path | str) else held_out
    source = find_data(str(train), "data.train")
    return load_rows(source, other, data_format=kind, split="train", eval_split="train", seed=3)


def rows_of(file: Path, content: str | bytes | None = None) -> RowList:
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [dict(row) for row in loaded(file).train]


def rejected(file: Path, content: str | bytes, kind: str = "auto") -> Problem:
    """The problem of a file with this content."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError) as caught:
        list(loaded(file, kind=kind).train)
    (problem,) = caught.value.problems
    assert problem.file == str(file)
    return problem


def write(file: Path, rows: RowList) -> None:
    """Writes rows like the usual writers of each file type."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


KINDS = (".jsonl", ".json", ".csv", ".parquet")
LOOKS_LIKE_SOMETHING_ELSE = (
    *("null", "NA", "N/A", "None", "nan", "NaN", "", " ", "007", "1.50", "1e5", "-0", "true", "False", "2024-01-02"),
    *(
        '{"a": 1}',
        '[1, "2"]',
        '"quoted"',
        "a,b;c\td",
        'say "yes"',
        "a\nb",
        "a\r\nb",
        "\r",
        "a\u2028b\x85c",
        "\x00",
        "#x",
    ),
    *("é — 漢字 \U0001f600", "\\n", "\\ud83d", "12345678901234567890123", "inf", "'", "=1+1", "\ufeffa"),
)
TEXT = st.one_of(st.sampled_from(LOOKS_LIKE_SOMETHING_ELSE), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.mark.parametrize("suffix", KINDS)
def test_text_stays_text(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": text} for text in LOOKS_LIKE_SOMETHING_ELSE]
    write(tmp_path / f"x{suffix}", rows)
    assert rows_of(tmp_path / f"x{suffix}") == rows


@pytest.mark.parametrize("suffix", KINDS)
@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_any_text_survives_a_round_trip(
    suffix: str, tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    file = tmp_path_factory.mktemp("rows") / f"x{suffix}"
    rows = [{"prompt": first, "completion": second} for first, second in pairs]
    write(file, rows)
    assert rows_of(file) == rows


def test_a_text_file_is_one_row_with_its_line_ends(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "x.txt", "a\r\nb\n\nNA\n") == [{"text": "a\r\nb\n\nNA\n"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_byte_order_mark_is_not_text(suffix: str, tmp_path: Path) -> None:
    content = {".csv": "text\na\n", ".txt": "a"}.get(suffix, '{"text": "a"}')
    assert rows_of(tmp_path / f"x{suffix}", b"\xef\xbb\xbf" + content.encode()) == [{"text": "a"}]


def test_a_byte_order_mark_inside_joined_files_is_not_text(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "x.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n') == [{"text": "a"}, {"text": "b"}]


TWO = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n{"text": "b"}',
        '\n{"text": "a"}\r\n\r\n{"text": "b"}\r\n\n',
        '{"text": "a"}{"text": "b"}',
        '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
        '[{"text": "a"}, {"text": "b"}]',
        '[\n{"text": "a"}\n,\n{"text": "b"}\n]\n',
        '{"version": "1", "data": [{"text": "a"}, {"text": "b"}]}',
        '["a", "b"]',
        '"a"\n"b"\n',
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson"])
def test_rows_of_json_in_every_arrangement(name: str, content: str, tmp_path: Path) -> None:
    assert rows_of(tmp_path / name, content) == TWO


def test_one_row_with_a_list_of_objects_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert rows_of(tmp_path / "x.json", json.dumps(row, indent=2)) == [row]


def test_rows_longer_than_a_chunk(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "é\n" * 1_500_000}, {"text": "b"}]
    write(tmp_path / "x.jsonl", rows)
    assert rows_of(tmp_path / "x.jsonl") == rows
    locations = [row.location for row in loaded(tmp_path / "x.jsonl").train]
    assert [(location.row, location.line) for location in locations] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(suffix: str, compress: Any, tmp_path: Path) -> None:
    two_members = compress(b'{"text": "a"}\n') + compress(b'{"text": "b"}\n')
    assert rows_of(tmp_path / f"x.jsonl{suffix}", two_members) == TWO
    problem = rejected(tmp_path / f"y.jsonl{suffix}", two_members[:-9])
    assert problem.message.startswith("cannot be read")


def test_zstd_needs_no_extra_package(tmp_path: Path) -> None:
    frames = [pyarrow.compress(text, codec="zstd", asbytes=True) for text in (b'{"text": "a"}\n', b'{"text": "b"}\n')]
    assert rows_of(tmp_path / "x.jsonl.zst", b"".join(frames)) == TWO
    assert "cannot be read" in rejected(tmp_path / "y.jsonl.zst", b"".join(frames)[:-5]).message


@pytest.mark.parametrize(
    ("name", "content", "words", "line"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "row 2 cannot be read: not valid JSON in column 10", 2),
        ("x.jsonl", '{"text": \n{"text": "b"}\n', "row 1 cannot be read", 1),
        ("x.jsonl", '{"text": "a"}\n\n{"text": "b",}\n{"text": "c"}\n', "row 2 cannot be read", 3),
        ("x.jsonl", '{"text": "a"}\n{"text": "b\n{"text": "c"}\n', "row 2 cannot be read", 2),
        ("x.jsonl", '{"text": "a"}\n{"text": "b', "the row is cut off", 2),
        ("x.json", '[{"text": "a"},\n{"text": "b"}\n', "ends in the middle of its array", 3),
        ("x.json", '[{"text": "a"}\n{"text": "b"}]', "expected ',' or ']'", 2),
        ("x.jsonl", '[{"role": "user"}]\n[{"role": "user"}]\n', "expected the end of the file", 2),
        ("x.json", '[[{"role": "user"}]]', "row 1 cannot be read: it is a list", 1),
        ("x.jsonl", '{"text": "a"}\n5\n', "row 2 cannot be read: it is 5", 2),
        ("x.json", '{"a": [{"text": "a"}], "b": [{"text": "b"}]}', "several arrays of rows: a, b", None),
        ("x.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "row 2 cannot be read: duplicate key `text`", 2),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n',
            "row 1 cannot be read: duplicate key `content`",
            1,
        ),
        ("x.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', "row 2 cannot be read: `text` has half", 2),
        ("x.jsonl", '{"text": "a"}\n{"text": ' + "[" * 200_000, "nested too deeply", 2),
        ("x.csv", "prompt,completion\na,b\nc,d,e\n", "row 2 cannot be read: 3 cells, but the header has 2", 3),
        (
            "x.csv",
            'prompt,completion\n"a\nb",c\nd,"e\nf,g\n',
            "row 2 cannot be read: it has a quote that is never closed",
            4,
        ),
        ("x.csv", 'text\n"a"b\n', "row 1 cannot be read", 2),
        ("x.csv", "text,text\na,b\n", "duplicate columns in the header: text", 1),
        ("x.csv", "", "found no rows", None),
        ("x.jsonl", "", "found no rows", None),
        ("x.json", "[]", "found no rows", None),
        ("x.parquet", "hello", "cannot be read", None),
        ("x.jsonl", '{"text": "a"}\n{"text": 5}\n', r"row 2: text must be text, found a number (5)", 2),
        ("x.jsonl", '{"instruction": "a", "output": "b", "input": 5}\n', "row 1: input must be text", 1),
        ("x.json", '{"prompt": ["a", "b"], "completion": ["c", "d"]}', "row 1: prompt and completion are lists", 1),
        ("x.json", '{"text": {"0": "a", "1": "b"}}', "row 1: text must be text, found an object", 1),
        ("x.jsonl", '{"messages": "hello"}', "row 1: messages must be a list of messages", 1),
        ("x.jsonl", '{"question": "a"}', "columns question do not match any format", None),
    ],
)
def test_errors_name_the_row_and_the_line(
    name: str, content: str, words: str, line: int | None, tmp_path: Path
) -> None:
    problem = rejected(tmp_path / name, content)
    assert words in problem.message
    assert problem.line == line
    assert (problem.key or "").startswith("data.")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_other_encodings_are_rejected_with_a_hint(suffix: str, tmp_path: Path) -> None:
    text = {".csv": "text\na\né\n", ".txt": "a\nb\né\n"}.get(suffix, '{"text": "a"}\n\n{"text": "é"}\n')
    latin = rejected(tmp_path / f"x{suffix}", text.encode("latin-1"))
    assert (latin.line, "byte 0xe9" in latin.message, "UTF-8" in str(latin.hint)) == (3, True, True)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        wide = rejected(tmp_path / f"x{suffix}", text.encode(encoding))
        assert "not UTF-8" in wide.message
        assert "save it as UTF-8" in str(wide.hint)


def test_a_compressed_file_with_another_suffix_is_rejected_as_compressed(tmp_path: Path) -> None:
    problem = rejected(tmp_path / "x.jsonl", gzip.compress(b'{"text": "a"}'))
    assert (problem.message, problem.hint) == (
        "cannot be read: it is compressed with gzip",
        "add .gz to its name",
    )
    assert rows_of(tmp_path / "y.jsonl.GZ", gzip.compress(b'{"text": "a"}')) == [{"text": "a"}]


@pytest.mark.parametrize("content", ['{"text": "a"},\n{"text": "b"}\n', '[{"text": "a"},]', '{"text": "a",}\n'])
def test_an_extra_comma_has_a_hint(content: str, tmp_path: Path) -> None:
    assert "remove the comma" in str(rejected(tmp_path / "x.json", content).hint)
    assert "comma" not in str(rejected(tmp_path / "y.jsonl", '{"text": "a,] b" "c"}').hint)


def test_duplicates_of_unused_keys_are_allowed(tmp_path: Path) -> None:
    rows = '{"text": "a", "m": {"x": 1, "x": 2}, "n": 1, "n": 2}\n'
    assert [row["text"] for row in rows_of(tmp_path / "x.jsonl", rows)] == ["a"]


def test_parquet_columns_with_the_same_name_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), file)
    with pytest.raises(RequestError, match="more than one column text"):
        loaded(file)


@pytest.mark.parametrize(
    ("names", "noted"),
    [
        (("train", "test"), ["test"]),
        (("train-00000-of-00001", "validation-00000-of-00001"), ["validation-00000-of-00001"]),
        (("my_train", "my_dev"), ["my_dev"]),
        (("train_1", "train_2"), []),
        (("contest", "training"), []),
        (("test", "other"), []),
    ],
)
def test_files_of_other_splits_in_a_folder_are_noted(names: tuple[str, ...], noted: list[str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / f"{name}.jsonl", [{"text": "a"}])
    found = [note for note in loaded(tmp_path).train.notes if "its rows are trained on" in note]
    assert len(found) == len(noted)
    assert all(name in found[0] for name in noted)


def test_unused_columns_may_differ_in_name_and_type(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", [{"text": "a", "meta": None, "ids": [1]}, {"text": "b", "meta": {"x": "y"}, "ids": "no"}])
    (folder / "b.jsonl").write_text('{"meta": 5, "text": "c", "n": ' + "1" * 5000 + "}\n")
    assert [row["text"] for row in loaded(folder).train] == ["a", "b", "c"]
    assert loaded(folder).train.column_names == ("text", "meta", "ids", "n")


def test_an_unused_parquet_column_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [{"text": "NA", "image": b"1", "n": 1}, {"text": "b", "image": b"2", "n": 2}])
    assert rows_of(tmp_path / "x.parquet") == [{"text": "NA"}, {"text": "b"}]
    write(tmp_path / "y.parquet", [{"text": "NA", "prompt": b"1"}])
    assert rows_of(tmp_path / "y.parquet")[0]["text"] == "NA"


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_type_of_text_in_parquet(kind: Any, dictionary: bool, tmp_path: Path) -> None:
    column = pyarrow.array(["a", "b"], kind if not dictionary else pyarrow.string())
    column = column.dictionary_encode() if dictionary else column
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    assert rows_of(tmp_path / "x.parquet") == TWO


@pytest.mark.parametrize(
    ("values", "words"),
    [([b"a"], "row 1: text must be text, found bytes"), ([1], "row 1: text must be text, found a number (1)")],
)
def test_parquet_columns_without_text_are_rejected_by_name(values: list[Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [{"text": value} for value in values])
    with pytest.raises(RequestError) as caught:
        rows_of(tmp_path / "x.parquet")
    assert words in caught.value.problems[0].message


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_as_json_text_or_as_a_list_per_field_are_read(column: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": '{"a": 1}'}, {"role": "assistant", "content": "007"}]
    by_field = {"role": ["user", "assistant"], "content": ['{"a": 1}', "007"]}
    for value in (turns, json.dumps(turns), by_field):
        write(tmp_path / "x.parquet", [{column: value}])
        assert rows_of(tmp_path / "x.parquet") == [{column: turns}]


def test_missing_columns_are_named_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    write(file, [{"messages": [{"role": "user", "content": "a"}]}, {"text": "b"}, {"text": "c"}])
    read = loaded(file)
    assert len(list(read.train)) == 3
    (note,) = read.notes()
    assert note.startswith(f"2 of 3 rows of data.train have no messages (row 2 of {file} is the first)")


def test_a_column_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    problem = rejected(tmp_path / "x.jsonl", '{"text": "b"}\n', kind="prompt-completion")
    assert problem.message == "no row has completion; the columns are text"
    assert "data.format" in str(problem.hint)


def test_cells_after_the_end_of_a_row_are_missing(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "x.csv", "prompt,completion\na\n\nb,c\n") == [
        {"prompt": "a"},
        {"prompt": "b", "completion": "c"},
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", "prompt\tcompletion\na,1\tb\n"),
        ("x.csv", "prompt\tcompletion\na,1\tb\n"),
        ("x.csv", "prompt;completion\na,1;b\n"),
        ("x.csv", 'prompt, completion\n"a,1",b\n'),
        ("x.csv", 'prompt,completion\r"a,1",b\r'),
        ("x.csv", '\ufeffprompt,completion\r\n"a,1",b'),
    ],
)
def test_delimiters(name: str, content: str, tmp_path: Path) -> None:
    assert rows_of(tmp_path / name, content) == [{"prompt": "a,1", "completion": "b"}]


def texts(rows: Any) -> list[str]:
    return [row["text"] for row in rows]


def test_held_out_rows_depend_only_on_the_seed_and_no_row_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"text": str(number)} for number in range(50)])
    read = loaded(tmp_path / "x.jsonl", 0.1)
    assert read.eval is not None
    train, held_out = texts(read.train), texts(read.eval)
    assert (len(train), len(read.train), len(held_out), len(read.eval)) == (45, 45, 5, 5)
    assert sorted(train + held_out, key=int) == [str(number) for number in range(50)]
    assert set(held_out) == {str(number) for number in np.random.default_rng(3).permutation(50)[:5]}
    assert read.shared_rows() == 0
    assert texts(read.eval) == held_out


def test_a_fraction_that_leaves_no_training_rows_is_rejected() -> None:
    with pytest.raises(RequestError, match="leaves no rows to train on"):
        held_out_rows(1, 0.5, 0)


def test_evaluation_rows_that_are_training_rows_are_counted(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    chat = {"messages": [{"content": "a", "role": "user"}, {"role": "assistant", "content": "b"}], "id": 1}
    write(one, [chat, {"messages": [{"role": "user", "content": "c", "name": "x"}]}])
    write(other, [{**chat, "id": 7}, {"messages": [{"role": "user", "content": "new", "name": "y"}]}])

    def shared(held_out: Path | float) -> int:
        read = loaded(one, held_out)
        assert read.eval is not None
        assert list(read.train) and list(read.eval)
        return read.shared_rows()

    assert shared(one) == 2
    assert shared(other) == 1
    write(one, [chat] * 8)
    assert shared(0.25) == 2


def test_a_file_that_is_listed_twice_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", TWO)
    source = find_data([str(tmp_path / "x.jsonl")] * 2, "data.train")
    read = load_rows(source, None, data_format="auto", split="train", eval_split="train", seed=3)
    assert texts(read.train) == ["a", "b", "a", "b"]
    assert read.notes() == (f"data.train names {tmp_path / 'x.jsonl'} 2 times: its rows are used 2 times",)


def test_a_file_without_any_content_column_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"text": "a"}])
    write(tmp_path / "b.parquet", [{"question": "b"}, {"question": "c"}])
    read = loaded(tmp_path)
    assert [dict(row) for row in read.train] == [{"text": "a"}, {}, {}]
    (note,) = read.notes()
    assert note.startswith(f"2 of 3 rows of data.train have no text (row 1 of {tmp_path / 'b.parquet'} is the first)")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_file_that_changes_during_reading_is_rejected(rows: int, tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", TWO)
    read = loaded(tmp_path / "x.jsonl")
    write(tmp_path / "x.jsonl", [{"text": "a"}] * rows)
    with pytest.raises(RequestError, match="the number of rows changed"):
        list(read.train)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    row = {"prompt": "a" * 300_000, "completion": 'b"\n' * 100_000}
    write(tmp_path / "x.csv", [row])
    assert rows_of(tmp_path / "x.csv") == [row]

"""Tokenising in several processes: the same store whatever their number, after a kill too, and the first error."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from launcher.errors import LauncherError, RequestError
from launcher.plan.facts import DataFacts
from launcher.prepare import part_processes, row_parts
from launcher.prepare.sources import DataSource
from launcher.prepare.tokenise import TextRequest, tokenise
from tests.local.test_prepare import as_csv
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.tiny_models import make_tiny_tokenizer

pytestmark = pytest.mark.local

ROWS = 700
WORDS = ["alpha", "beta", "gamma", "é", "漢字", "\n", "1.50"]
RowList = list[dict[str, Any]]


def chats() -> RowList:
    draw = random.Random(3)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "!"

    rows: RowList = []
    for number in range(ROWS):
        turns = [{"role": ("user", "assistant")[k % 2], "content": text()} for k in range(draw.choice((2, 4, 6)))]
        rows.append({"messages": turns if number % 50 else turns[:1]})
    return rows


def texts() -> RowList:
    draw = random.Random(4)
    return [{"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))} for _ in range(ROWS)]


def as_lines(file: Path, rows: RowList) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def as_gzip(file: Path, rows: RowList) -> None:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_array(file: Path, rows: RowList) -> None:
    file.write_text(json.dumps(rows, indent=1))


def as_parquet(file: Path, rows: RowList) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)


FILES: dict[str, tuple[str, Callable[[Path, RowList], None]]] = {
    "x.jsonl": ("json", as_lines),
    "x.jsonl.gz": ("json", as_gzip),
    "x.json": ("json", as_array),
    "x.csv": ("csv", as_csv),
    "x.parquet": ("parquet", as_parquet),
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART_BYTES", 4096)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def tokenised(
    tokenizer_folder: Path,
    file: Path,
    processes: int | None,
    *,
    eval: DataSource | float | None = None,
    name: str = "",
    progress: Callable[..., None] = lambda **_: None,
) -> DataFacts:
    source = DataSource((file,), FILES[file.name][0])
    request = TextRequest(source, eval, "auto", 64, "train", seed=3, processes=processes)
    return tokenise(request, tokenizer_folder, file.parent / f"{name or processes}-{file.name}", False, progress)


def stored(facts: DataFacts) -> dict[str, bytes]:
    """The files of the store, by split and name."""
    folder = Path(facts.train.folder).parent
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def without_place(facts: DataFacts) -> dict[str, Any]:
    """The facts but for folders and file names."""
    found = facts.model_dump()
    for name in ("train", "eval"):
        (found[name] or {}).pop("folder", None)
    return {**found, "fingerprint": "", "notes": [note.split(" (row")[0] for note in found["notes"]]}


@pytest.mark.parametrize("make", [chats, texts])
def test_the_store_does_not_depend_on_the_number_of_processes_or_the_file_type(
    make: Callable[[], RowList], tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows, found = make(), {}
    for name, (_, write) in FILES.items():
        if name == "x.csv" and make is chats:
            continue
        write(tmp_path / name, rows)
        for processes in (1, 3) if name == "x.jsonl" else (2,):
            facts = tokenised(tokenizer_folder, tmp_path / name, processes, eval=0.1)
            found[name, processes] = (stored(facts), without_place(facts))
    first = found["x.jsonl", 1]
    assert first[1]["train"]["rows"] + first[1]["eval"]["rows"] == ROWS
    assert len(first[0]) == 8
    assert all(one == first for one in found.values())


def test_stored_data_sets_and_text_files_are_tokenised_in_processes_too(tokenizer_folder: Path, tmp_path: Path) -> None:
    import datasets

    as_lines(tmp_path / "x.jsonl", texts())
    expected = tokenised(tokenizer_folder, tmp_path / "x.jsonl", 1)
    datasets.Dataset.from_list(texts()).save_to_disk(str(tmp_path / "saved"))
    request = TextRequest(DataSource(saved=tmp_path / "saved"), None, "auto", 64, "train", seed=3, processes=2)
    facts = tokenise(request, tokenizer_folder, tmp_path / "from-saved", False, lambda **_: None)
    assert stored(facts) == stored(expected)

    files = []
    for number, row in enumerate(texts()[:30]):
        files.append(tmp_path / f"{number:03}.txt")
        files[-1].write_bytes(row["text"].encode())
    as_lines(tmp_path / "few.jsonl", texts()[:30])
    stores = []
    for source, processes in (
        (DataSource(tuple(files), "text"), 2),
        (DataSource((tmp_path / "few.jsonl",), "json"), 1),
    ):
        request = TextRequest(source, None, "auto", 64, "train", seed=3, processes=processes)
        stores.append(stored(tokenise(request, tokenizer_folder, tmp_path / f"s{processes}", False, lambda **_: None)))
    assert stores[0] == stores[1]


def test_many_rows_are_tokenised_in_other_processes_by_themselves(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    init = part_processes._Process.__init__
    monkeypatch.setattr(
        part_processes._Process, "__init__", lambda self, *given: (started.append(self), init(self, *given))[1]
    )
    monkeypatch.setattr(part_processes, "available_cpus", lambda: 2)
    as_lines(tmp_path / "x.jsonl", chats())
    few = tmp_path / "few" / "x.jsonl"
    few.parent.mkdir()
    as_lines(few, chats()[:40])
    assert few.stat().st_size > 2 * 4096
    tokenised(tokenizer_folder, few, None)
    assert started == []
    facts = tokenised(tokenizer_folder, tmp_path / "x.jsonl", None)
    assert len(started) == 2
    assert all(process._process.returncode is not None for process in started)
    assert stored(facts) == stored(tokenised(tokenizer_folder, tmp_path / "x.jsonl", 1))


BAD = {
    "bad message": ({"messages": [{"role": "user"}]}, "row {row}: a message needs role and content"),
    "wrong role": ({"messages": [{"role": "critic", "content": "x"}]}, "row {row}: unknown role critic"),
    "not a list": ({"messages": "no"}, "row {row}: messages must be a list of messages"),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
def test_the_first_bad_row_is_reported_with_its_file_row_and_line(
    name: str, processes: int, tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = chats()
    for row, (bad, _) in zip((401, 402, 650), BAD.values(), strict=True):
        rows[row - 1] = bad
    FILES[name][1](tmp_path / name, rows)
    with pytest.raises(RequestError) as caught:
        tokenised(tokenizer_folder, tmp_path / name, processes)
    (problem,) = caught.value.problems
    assert problem.message.startswith(BAD["bad message"][1].format(row=401))
    assert (problem.file, problem.key) == (str(tmp_path / name), "data.train")
    if name != "x.json":
        assert problem.line == 401
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unreadable_row_is_reported_as_it_is_for_a_small_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    as_lines(file, chats())
    lines = file.read_text().splitlines()
    lines[399] = BAD["bad message"][0].__repr__().replace("'", '"')
    lines[499] = lines[499].replace('"role"', '"role')
    file.write_text("\n".join(lines))
    with pytest.raises(RequestError) as caught:
        tokenised(tokenizer_folder, file, 2)
    (problem,) = caught.value.problems
    assert problem.message.startswith("row 500 cannot be read: not valid JSON in column")
    assert (problem.file, problem.line) == (str(file), 500)


def test_rows_that_are_not_one_on_each_line_give_the_same_store(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = texts()
    as_lines(tmp_path / "x.jsonl", rows)
    expected = tokenised(tokenizer_folder, tmp_path / "x.jsonl", 1, eval=0.1)
    for change in (
        lambda text: text.replace('"}\n{', '"} {', 5),
        lambda text: text[:9000] + text[9000:].replace('{"', '{\n"'),
    ):
        other = tmp_path / f"{random.random()}" / "x.jsonl"
        other.parent.mkdir()
        other.write_text(change((tmp_path / "x.jsonl").read_text()))
        facts = tokenised(tokenizer_folder, other, 2, eval=0.1)
        assert stored(facts) == stored(expected)


@pytest.mark.parametrize(
    ("first", "rest", "kind"),
    [([{"text": "alpha"}] * 500, chats()[1:40], "messages"), ([{"title": "alpha " * 20}] * 100, texts(), "text")],
)
def test_later_columns_decide_the_format_as_they_do_in_a_small_file(
    first: RowList, rest: RowList, kind: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    as_lines(tmp_path / "x.jsonl", first + rest)
    as_gzip(tmp_path / "x.jsonl.gz", first + rest)
    lines, packed = (tokenised(tokenizer_folder, tmp_path / name, 2) for name in ("x.jsonl", "x.jsonl.gz"))
    assert lines.format == kind
    assert stored(lines) == stored(packed)
    assert without_place(lines) == without_place(packed)


def test_rows_in_both_splits_are_counted_over_all_parts(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = texts()
    as_lines(tmp_path / "x.jsonl", rows)
    other = tmp_path / "eval.jsonl"
    as_lines(other, [*rows[5:300], {"text": "not in train"}])
    facts = tokenised(tokenizer_folder, tmp_path / "x.jsonl", 2, eval=DataSource((other,), "json"))
    assert facts.shared_rows == 295


KILLED = """
import sys
from pathlib import Path
from launcher.prepare import row_parts, split_store
from launcher.prepare.split_store import SplitStore
from launcher.prepare.sources import DataSource
from launcher.prepare.tokenise import TextRequest, tokenise

row_parts.PART_BYTES = 4096
split_store.SYNC_SECONDS = 0.0
add = SplitStore.add
def slowly(store, part):
    add(store, part)
    print(store.finished, flush=True)
    sys.stdin.readline()
SplitStore.add = slowly
tokenizer, file, builder, target = sys.argv[1:]
request = TextRequest(DataSource((Path(file),), builder), 0.1, "auto", 64, "train", seed=3, processes=2)
tokenise(request, Path(tokenizer), Path(target), False, lambda **_: None)
"""


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_finished_parts_are_kept_after_a_kill(
    name: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_parts, "_PART_ROWS", 50)
    file = tmp_path / name
    FILES[name][1](file, texts())
    expected = tokenised(tokenizer_folder, file, 1, eval=0.1, name="whole")
    target = tmp_path / f"killed-{name}"
    script = KILLED.replace("row_parts.PART_BYTES = 4096", "row_parts.PART_BYTES, row_parts._PART_ROWS = 4096, 50")
    command = [sys.executable, "-c", script, str(tokenizer_folder), str(file), FILES[name][0], str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(1, 6):
            assert process.stdout.readline() == f"{number}\n"
            if number < 5:
                process.stdin.write("\n")
        process.kill()
    assert not target.exists()
    tokenised_here: list[int] = []
    one = part_processes.PartTokeniser.tokenise
    monkeypatch.setattr(
        part_processes.PartTokeniser,
        "tokenise",
        lambda self, part, split: (tokenised_here.append(1), one(self, part, split))[1],
    )
    facts = tokenised(tokenizer_folder, file, 1, eval=0.1, name="killed")
    again = len(tokenised_here)
    tokenised(tokenizer_folder, file, 1, eval=0.1, name="again")
    assert len(tokenised_here) - again == again + 5
    assert stored(facts) == stored(expected)
    assert {**without_place(facts)} == without_place(expected)


def test_processes_end_with_the_one_that_started_them(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    as_lines(file, texts())
    command = [sys.executable, "-c", KILLED, str(tokenizer_folder), str(file), "json", str(tmp_path / "target")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert len(children) == 2
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}/cmdline").exists() for child in children)


def test_a_process_that_is_killed_is_named_as_the_reason(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_lines(tmp_path / "x.jsonl", texts())
    ask = part_processes._Process.tokenise

    def killed(self: Any, part: Any, split: Any) -> Any:
        if part.row > 200:
            os.kill(self._process.pid, signal.SIGKILL)
        return ask(self, part, split)

    monkeypatch.setattr(part_processes._Process, "tokenise", killed)
    with pytest.raises(LauncherError, match=r"ended with status -9: the memory may be full"):
        tokenised(tokenizer_folder, tmp_path / "x.jsonl", 2, name="killed")
    monkeypatch.undo()
    monkeypatch.setattr(row_parts, "PART_BYTES", 4096)
    facts = tokenised(tokenizer_folder, tmp_path / "x.jsonl", 2, name="killed")
    assert stored(facts) == stored(tokenised(tokenizer_folder, tmp_path / "x.jsonl", 1))


def test_two_processes_tokenise_the_same_data_once(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    as_lines(file, texts())
    told: list[str] = []
    target = tmp_path / "both-x.jsonl"
    command = [sys.executable, "-c", KILLED, str(tokenizer_folder), str(file), "json", str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "1\n"

        def release(**progress: Any) -> None:
            told.append(progress["message"])
            process.stdin.write("\n" * 10_000)  # type: ignore[union-attr]

        facts = tokenised(tokenizer_folder, file, 1, eval=0.1, name="both", progress=release)
    assert len(told) == 1
    assert told[0].startswith(f"waiting for process {process.pid} on ")
    assert stored(facts) == stored(tokenised(tokenizer_folder, file, 1, eval=0.1))

"""A store that is written part by part: what a kill leaves of it is continued."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launcher.prepare import split_store
from launcher.prepare.part_tokeniser import Counts, TokenisedPart
from launcher.prepare.row_checks import RowChecks
from launcher.prepare.split_store import SplitStore, remove_journal
from launcher.token_store import Sequences, TokenStore


@pytest.fixture(autouse=True)
def _each_part_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_store, "SYNC_SECONDS", 0.0)


def part(number: int) -> TokenisedPart:
    """A part of two sequences, with `number` in every count."""
    tokens = np.arange(5, dtype=np.int32) + 10 * number
    lengths, targets = np.array([2, 3], dtype=np.int64), np.array([1, 2], dtype=np.int32)
    counts = Counts(rows=3, cut=number, largest=number, dropped=Counter({"are empty": 1}), columns={f"c{number}": None})
    checks = RowChecks("text", True, array("Q", [number]), Counter({"text": 1}), {"text": f"row {number}"})
    return TokenisedPart(Sequences(tokens.tobytes(), b"\1" * 5, lengths, targets), counts, checks)


def opened(folder: Path, identity: str = "same") -> SplitStore:
    return SplitStore(folder, identity, RowChecks("text", True))


def whole(folder: Path, *, parts: range = range(4)) -> dict[str, bytes]:
    """Writes the parts that are missing; returns the files of the store."""
    store = opened(folder)
    for number in parts[store.finished :]:
        store.add(part(number))
    store.complete()
    remove_journal(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    return whole(tmp_path / "expected")


def test_a_store_that_was_closed_between_parts_is_continued(tmp_path: Path, expected: dict[str, bytes]) -> None:
    for _ in range(2):
        store = opened(tmp_path / "train")
        store.add(part(store.finished))
        store.close()
    again = opened(tmp_path / "train")
    assert (again.finished, again.counts.rows, again.counts.cut, again.counts.largest) == (2, 6, 1, 1)
    assert (again.counts.dropped, list(again.counts.columns)) == (Counter({"are empty": 2}), ["c0", "c1"])
    assert (again.checks.fingerprints.tolist(), again.checks.missing) == ([0, 1], Counter({"text": 2}))
    assert again.checks.first_missing == {"text": "row 0"}
    again.close()
    assert whole(tmp_path / "train") == expected
    assert len(TokenStore(tmp_path / "train")) == 8


def test_what_was_written_behind_the_last_whole_part_is_dropped(tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = tmp_path / "train"
    store = opened(folder)
    store.add(part(0))
    store.close()
    for name in ("tokens.i32", "learned.u8", "offsets.i64", "targets.i32", "fingerprints.u64"):
        with (folder / name).open("ab") as file:
            file.write(b"torn off")
    with (folder / "parts.jsonl").open("a") as file:
        file.write('{"sequences": 4, "fing')
    again = opened(folder)
    assert again.finished == 1
    again.close()
    assert whole(folder) == expected


@pytest.mark.parametrize("lost", ["tokens.i32", "learned.u8", "offsets.i64", "targets.i32", "fingerprints.u64"])
def test_a_file_that_is_too_short_starts_the_split_from_scratch(
    lost: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "train"
    store = opened(folder)
    store.add(part(0))
    store.add(part(1))
    store.close()
    (folder / lost).write_bytes(b"")
    again = opened(folder)
    assert (again.finished, again.counts.rows, len(again.checks.fingerprints)) == (0, 0, 0)
    again.close()
    assert whole(folder) == expected


def test_parts_of_another_source_are_not_used(tmp_path: Path) -> None:
    store = opened(tmp_path / "train")
    store.add(part(0))
    store.close()
    other = opened(tmp_path / "train", "another number of rows")
    assert (other.finished, other.facts()["tokens"]) == (0, 0)
    other.close()

"""Token stores: written sequences are read back, and a folder appears complete or not at all."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.token_store import TokenStore, TokenWriter, publish_folder

SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), min_size=1, max_size=20), min_size=1, max_size=20
)


def write(folder: Path, sequences: list[list[tuple[int, int]]]) -> dict[str, int]:
    with TokenWriter(folder) as writer:
        for sequence in sequences:
            writer.add([token for token, _ in sequence], [learned for _, learned in sequence])
        return writer.facts()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(sequences=SEQUENCES)
def test_written_sequences_are_read_back(sequences: list[list[tuple[int, int]]], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("store") / "train"
    facts = write(folder, sequences)
    store = TokenStore(folder)

    assert len(store) == len(sequences) == facts["sequences"]
    for index, sequence in enumerate(sequences):
        tokens, learned = store[index]
        assert list(zip(tokens.tolist(), learned.tolist(), strict=True)) == sequence
        assert store.targets[index] == sum(bit for _, bit in sequence[1:])
    assert store.lengths(range(len(sequences))).tolist() == [len(sequence) for sequence in sequences]
    assert facts["tokens"] == sum(map(len, sequences))
    assert facts["targets"] == int(store.targets.sum())
    assert facts["longest"] == max(map(len, sequences))
    assert json.loads((folder / "facts.json").read_text()) == facts


def test_a_store_is_read_only(tmp_path: Path) -> None:
    write(tmp_path / "train", [[(1, 1)]])
    tokens, _ = TokenStore(tmp_path / "train")[0]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 2


def test_a_failed_writer_leaves_no_files(tmp_path: Path) -> None:
    def fail() -> None:
        with TokenWriter(tmp_path / "train") as writer:
            writer.add([1], [1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path / "train").exists()


def test_the_folder_does_not_exist_before_the_writer_ends(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    with TokenWriter(folder) as writer:
        writer.add([1, 2], [0, 1])
        assert not folder.exists()
    assert len(TokenStore(folder)) == 1


def test_the_folder_of_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    folder, both = tmp_path / "train", threading.Barrier(2)

    def race(token: int) -> None:
        with TokenWriter(folder) as writer:
            writer.add([token] * 3, [1] * 3)
            both.wait()

    threads = [threading.Thread(target=race, args=(token,)) for token in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    tokens, learned = TokenStore(folder)[0]
    assert tokens.tolist() in ([7] * 3, [8] * 3)
    assert np.all(learned == 1)


def test_a_file_with_the_folder_s_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "train").write_text("a file")
    with pytest.raises(OSError):
        publish_folder(tmp_path / "temporary", tmp_path / "train")
    assert (tmp_path / "train").read_text() == "a file"

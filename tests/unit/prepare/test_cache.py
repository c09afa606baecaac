"""The entries of a cache folder: which are listed, which may be removed, and which are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.prepare import cache as module
from launcher.prepare.cache import cache_entries, clean, describe, keep_below, remove, using

HOUR = 3600.0
NAMES = [f"{number:024x}" for number in range(4)]


def make(cache: Path, number: int, hours: float, size: int = 1000) -> Path:
    """An entry of tokenised data that was last used `hours` ago."""
    entry = cache / "data" / NAMES[number]
    (entry / "train").mkdir(parents=True)
    (entry / "train/tokens.i32").write_bytes(bytes(size))
    (entry / "facts.json").write_text("{}")
    describe(entry, f"data {number}")
    age(entry / "facts.json", hours)
    return entry


def age(file: Path, hours: float) -> None:
    when = time.time() - hours * HOUR
    os.utime(file, (when, when))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three entries of data, a converted model, an unfinished entry, and files that are not entries."""
    cache = tmp_path / ".cache"
    for number, hours in ((0, 5), (1, 50), (2, 500)):
        make(cache, number, hours)
    model = cache / "models" / f"gguf-{NAMES[3]}"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    age(model / "config.json", 40)
    (cache / "models" / f"{NAMES[3]}.json").write_text("{}")
    unfinished = cache / "data" / f".{NAMES[3]}.partial"
    (unfinished / "train").mkdir(parents=True)
    for name in ("lock", "train/tokens.i32"):
        (unfinished / name).touch()
        age(unfinished / name, 30)
    return cache


def names(cache: Path) -> list[str]:
    return [entry.path.name for entry in cache_entries(cache)]


def test_entries_are_listed_with_what_they_are(cache: Path) -> None:
    found = {entry.path.name: entry for entry in cache_entries(cache)}
    assert list(found) == [NAMES[2], NAMES[1], f"gguf-{NAMES[3]}", f".{NAMES[3]}.partial", NAMES[0]]
    assert [entry.kind for entry in found.values()] == ["data", "data", "model", "unfinished", "data"]
    assert found[NAMES[1]].about == "data 1"
    assert 1000 < found[NAMES[1]].bytes < 1100
    assert found[NAMES[1]].unused_seconds == pytest.approx(50 * HOUR, abs=60)
    assert not any(entry.in_use for entry in found.values())


def test_a_use_makes_an_entry_recent(cache: Path) -> None:
    with using([str(cache / "data" / NAMES[2] / "train"), str(cache / "models" / f"gguf-{NAMES[3]}")]):
        pass
    recent = [entry.path.name for entry in cache_entries(cache) if entry.unused_seconds < 60]
    assert sorted(recent) == sorted([NAMES[2], f"gguf-{NAMES[3]}"])


def test_old_entries_are_removed_and_younger_ones_kept(cache: Path) -> None:
    removed, kept = clean(cache, 45 * HOUR)
    assert [entry.path.name for entry in removed] == [NAMES[2], NAMES[1]]
    assert kept == []
    assert names(cache) == [f"gguf-{NAMES[3]}", f".{NAMES[3]}.partial", NAMES[0]]
    clean(cache, 0)
    assert names(cache) == []
    assert (cache / "models" / f"{NAMES[3]}.json").is_file()


def test_an_entry_that_was_used_just_now_is_kept(cache: Path) -> None:
    with using([str(cache / "data" / NAMES[1] / "train")]):
        pass
    _, kept = clean(cache, 0)
    assert [entry.path.name for entry in kept] == [NAMES[1]]
    assert names(cache) == [NAMES[1]]


HOLDER = """
import sys, time
from launcher.prepare.cache import using
with using(sys.argv[1:]):
    print("marked", flush=True)
    time.sleep(600)
"""


def test_entries_of_a_live_process_are_kept_until_it_is_killed(cache: Path) -> None:
    folders = [str(cache / "data" / NAMES[1] / "train"), str(cache / "models" / f"gguf-{NAMES[3]}")]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *folders], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "marked\n"
        _, kept = clean(cache, 0)
        used = {NAMES[1], f"gguf-{NAMES[3]}"}
        assert {(entry.path.name, entry.in_use) for entry in kept} == {(name, True) for name in used}
        assert set(names(cache)) == used
    finally:
        holder.kill()
        holder.communicate()
    assert not any(entry.in_use for entry in cache_entries(cache))
    for name in (NAMES[1], f"gguf-{NAMES[3]}"):
        age(cache / "uses" / name / "used", 1)
    removed, kept = clean(cache, 0)
    assert (len(removed), kept, names(cache)) == (2, [], [])


def test_folders_outside_a_cache_are_not_marked(tmp_path: Path) -> None:
    (tmp_path / "data/models/llama").mkdir(parents=True)
    (tmp_path / "data/sets/train").mkdir(parents=True)
    with using([str(tmp_path / "data/models/llama"), str(tmp_path / "data/sets/train"), "/models/llama"]):
        assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_mark_is_gone_after_the_block(cache: Path) -> None:
    with using([str(cache / "data" / NAMES[0] / "train")]):
        assert [entry.in_use for entry in cache_entries(cache)].count(True) == 1
    assert [file.name for file in (cache / "uses" / NAMES[0]).iterdir()] == ["used"]


def test_an_entry_that_is_marked_while_it_is_removed_is_put_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = (entry for entry in cache_entries(cache) if entry.path.name == NAMES[1])
    rename = Path.rename

    def marked_first(path: Path, target: Path) -> Path:
        holding.__enter__()
        monkeypatch.setattr(Path, "rename", rename)
        return rename(path, target)

    holding = using([str(entry.path / "train")])
    monkeypatch.setattr(Path, "rename", marked_first)
    try:
        assert not remove(cache, entry)
    finally:
        holding.__exit__(None, None, None)
    assert (entry.path / "train/tokens.i32").is_file()


def test_the_limit_removes_what_was_not_used_for_the_longest_time(cache: Path) -> None:
    newest = make(cache, 3, 0, 3000)
    removed, total = keep_below(cache, 5100, newest)
    assert [entry.path.name for entry in removed] == [NAMES[2]]
    assert total == sum(entry.bytes for entry in cache_entries(cache)) <= 5200
    removed, total = keep_below(cache, 10, newest)
    assert names(cache) == [newest.name]
    assert total > 3000


def test_what_a_killed_cleaning_left_is_removed(cache: Path) -> None:
    left = cache / "data" / f".0123{module._REMOVED}"
    left.mkdir()
    assert left.name not in names(cache)
    clean(cache, 10_000 * HOUR)
    assert not left.exists()

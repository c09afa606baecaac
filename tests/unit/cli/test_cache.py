"""`launcher cache`: the table, the JSON, what is removed, and what is not accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.prepare.cache import using
from tests.unit.inputs import command
from tests.unit.prepare.test_cache import NAMES, age, make


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cache = tmp_path / "runs/.cache"
    for number, hours in ((0, 5), (1, 50), (2, 500)):
        make(cache, number, hours)
    return cache


def test_the_entries_are_listed_as_a_table_and_as_json(cache: Path, tmp_path: Path) -> None:
    table = command("cache", "list", "--output-dir", str(tmp_path / "runs"))
    assert (table.status, table.err) == (0, "")
    rows = [line.split() for line in table.out.splitlines()]
    assert [row[0] for row in rows[2:]] == [NAMES[2], NAMES[1], NAMES[0], "total"]
    assert rows[2][1:] == ["data", "1.0", "kB", "20", "d", "20", "h", "ago", "no", "data", "2"]
    found = json.loads(command("cache", "list", str(cache), "--json").out)
    assert [entry["about"] for entry in found] == ["data 2", "data 1", "data 0"]
    assert set(found[0]) == {"path", "kind", "about", "bytes", "unused_seconds", "in_use"}


def test_a_job_file_names_its_cache(cache: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {{name_or_path: m}}\ndata: {{train: t.jsonl, cache_dir: {cache}}}\n")
    assert len(json.loads(command("cache", "list", str(job), "--json").out)) == 3


def test_old_entries_are_removed(cache: Path) -> None:
    ended = command("cache", "clean", str(cache), "--older-than", "2d")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == f"removed 2 entries, 2.1 kB, from {cache}"
    assert [path.name for path in (cache / "data").iterdir()] == [NAMES[0]]


def test_all_entries_are_removed_but_those_in_use(cache: Path) -> None:
    with using([str(cache / "data" / NAMES[1] / "train")]):
        ended = command("cache", "clean", str(cache), "--all")
    assert "data 1: a live run uses it" in ended.out
    assert [path.name for path in (cache / "data").iterdir()] == [NAMES[1]]
    age(cache / "data" / NAMES[1] / "facts.json", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clean", "CACHE"], "clean needs either --older-than TIME or --all"),
        (["clean", "CACHE", "--all", "--older-than", "1d"], "clean needs either --older-than TIME or --all"),
        (["clean", "CACHE", "--older-than", "soon"], "--older-than: 'soon' is not a duration"),
        (["clean", "CACHE", "--all", "--json"], "--json is an option of list"),
        (["list", "CACHE", "--all"], "options of clean"),
        (["list", "CACHE/missing"], "cache folder not found"),
        (["drop", "CACHE"], "drop"),
    ],
)
def test_invalid_input_is_reported(arguments: list[str], message: str, cache: Path) -> None:
    ended = command("cache", *(one.replace("CACHE", str(cache)) for one in arguments))
    assert ended.status == 2
    assert message in ended.err
    assert len(list((cache / "data").iterdir())) == 3

"""Where a job's model and data lie, and the stamps that tell whether they have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import RequestError
from launcher.prepare.sources import (
    DataSource,
    file_stamps,
    find_data,
    find_model_folder,
    fingerprint,
    hub_hint,
    model_stamp,
    tokenizer_fingerprint,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data/deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "t.csv", "README.md"):
        (tmp_path / "data" / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(source: DataSource) -> list[str]:
    return [path.name for path in source.files]


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("data/a.jsonl", ["a.jsonl"]),
        ("data/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("data/**/*.jsonl", ["a.jsonl", "b.jsonl", "c.jsonl"]),
        (["data/b.jsonl", "data/a.jsonl"], ["b.jsonl", "a.jsonl"]),
        ("data/deep", ["c.jsonl"]),
    ],
)
def test_files_globs_lists_and_folders(value: str | list[str], files: list[str]) -> None:
    source = find_data(value, "data.train")
    assert (names(source), source.builder, source.hub_name) == (files, "json", None)


def test_a_file_whose_name_looks_like_a_glob(folder: Path) -> None:
    (folder / "data/x[1].jsonl").write_text("{}\n")
    assert names(find_data("data/x[1].jsonl", "data.train")) == ["x[1].jsonl"]


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("x.jsonl", "json"),
        ("x.JSON", "json"),
        ("x.parquet", "parquet"),
        ("x.csv", "csv"),
        ("x.txt", "text"),
        ("x.jsonl.gz", "json"),
        ("x.v2.csv.zst", "csv"),
    ],
)
def test_the_suffix_tells_the_kind(folder: Path, name: str, builder: str) -> None:
    (folder / name).write_text("")
    assert find_data(name, "data.train").builder == builder


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert find_data("~/data/a.jsonl", "data.train").files == (folder / "data/a.jsonl",)


@pytest.mark.parametrize("name", ["squad", "allenai/tulu-3", "org/data_v1.2"])
def test_hub_names(name: str) -> None:
    assert find_data(name, "data.train") == DataSource(hub_name=name)
    assert find_model_folder(name, None) is None


@pytest.mark.parametrize("name", ["org/data.jsonl", "a/b/c", "/nowhere", "../x", "org/", "has space", "data/*.txt"])
def test_names_that_the_hub_cannot_have(name: str) -> None:
    with pytest.raises(RequestError, match=r"data\.train: no file matches"):
        find_data(name, "data.train")


def test_a_hub_name_that_was_meant_as_a_file() -> None:
    assert hub_hint("data/a.json") == "did you mean data/a.jsonl?"
    assert "local files" in hub_hint("org/unlike-anything")


def test_a_model_folder(folder: Path) -> None:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert find_model_folder("model", None) == model
    (model / "m.gguf").write_text("GGUF")
    assert find_model_folder("model", "m.gguf") == model
    (folder / "link").symlink_to(model)
    assert find_model_folder("link", None) == model


def test_a_stamp_changes_with_the_file(folder: Path) -> None:
    file = folder / "data/a.jsonl"
    seen = {model_stamp(folder / "data")}
    file.write_text("{} \n")
    seen.add(model_stamp(folder / "data"))
    os.utime(file, ns=(1, 1))
    seen.add(model_stamp(folder / "data"))
    (folder / "data/new").write_text("")
    seen.add(model_stamp(folder / "data"))
    assert len(seen) == 4


def test_stamps_do_not_depend_on_the_order(folder: Path) -> None:
    files = sorted((folder / "data").glob("*.jsonl"))
    assert file_stamps(files) == file_stamps(files[::-1])
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1]) != fingerprint(["1"])


def test_the_tokenizer_counts_and_the_weights_do_not(folder: Path) -> None:
    model = folder / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    first = tokenizer_fingerprint(model)
    (model / "model.safetensors").write_text("weights")
    os.utime(model / "tokenizer.json", ns=(1, 1))
    assert tokenizer_fingerprint(model) == first
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(model) != first

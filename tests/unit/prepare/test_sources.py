"""Finding a job's model and data, and the stamps that show whether they have changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Problem, RequestError
from launcher.job.schema import DataSection
from launcher.prepare.sources import (
    DataSource,
    file_stamps,
    find_data,
    find_model_folder,
    find_split_data,
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
        ("x.ndjson", "json"),
        ("x.tsv", "csv"),
    ],
)
def test_the_suffix_determines_the_file_type(folder: Path, name: str, builder: str) -> None:
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
def test_names_that_are_not_valid_on_the_hub(name: str) -> None:
    with pytest.raises(RequestError, match=r"data\.train: no file matches"):
        find_data(name, "data.train")


def test_a_hub_name_that_looks_like_a_misspelt_file() -> None:
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


def test_the_fingerprint_depends_on_the_tokenizer_and_not_on_the_weights(folder: Path) -> None:
    model = folder / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    first = tokenizer_fingerprint(model)
    (model / "model.safetensors").write_text("weights")
    os.utime(model / "tokenizer.json", ns=(1, 1))
    assert tokenizer_fingerprint(model) == first
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(model) != first


def test_hidden_files_are_skipped(folder: Path) -> None:
    for name in ("._a.jsonl", ".a.jsonl.swp", ".hidden.jsonl", ".ipynb_checkpoints/a.jsonl", ".cache/x.jsonl"):
        path = folder / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0")
    (folder / "data/t.csv").unlink()
    for value in ("data", "data/*.jsonl", "data/*/../*.jsonl"):
        assert names(find_data(value, "data.train")) == ["a.jsonl", "b.jsonl"]
    assert names(find_data("data/**/*.jsonl", "data.train")) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names(find_data("data/.hidden.jsonl", "data.train")) == [".hidden.jsonl"]
    assert names(find_data("data/.hid*", "data.train")) == [".hidden.jsonl"]


def test_a_hidden_folder_that_is_named_is_read(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache/x.jsonl").write_text("{}\n")
    assert names(find_data(".cache", "data.train")) == ["x.jsonl"]
    assert names(find_data(str(folder / ".cache/*.jsonl"), "data.train")) == ["x.jsonl"]


def problem_of(value: str | list[str]) -> Problem:
    with pytest.raises(RequestError) as caught:
        find_data(value, "data.train")
    (problem,) = caught.value.problems
    return problem


def test_folders_without_data(folder: Path) -> None:
    (folder / "empty").mkdir()
    problem = problem_of("empty")
    assert (problem.message, problem.key) == ("the folder empty contains no data", "data.train")
    assert ".jsonl, .ndjson, .json, .parquet" in str(problem.hint)
    for name in ("outer/one", "outer/two", "outer/.three"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.parquet").write_text("")
    hint = str(problem_of("outer").hint)
    assert hint == "use one of its subfolders: outer/one, outer/two; for all files, use outer/*/*.parquet"
    assert names(find_data("outer/*/*.parquet", "data.train")) == ["x.parquet", "x.parquet"]


def save_to_disk_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    (folder / "data-00000-of-00001.arrow").write_text("")
    return folder


def test_folders_from_save_to_disk(folder: Path) -> None:
    save_to_disk_folder(folder / "saved")
    assert find_data("saved", "data.train") == DataSource(saved=Path("saved"))
    assert not DataSource(saved=Path("saved")).has_splits
    assert "cannot be combined with other files" in problem_of(["saved", "data/a.jsonl"]).message
    for split in ("train", "test"):
        save_to_disk_folder(folder / "dict" / split)
    (folder / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert find_data("dict", "data.train") == DataSource(saved=Path("dict"))
    assert DataSource(saved=Path("dict")).has_splits
    (folder / "above").mkdir()
    save_to_disk_folder(folder / "above/saved")
    assert problem_of("above").hint == "use one of its subfolders: above/saved"


def test_a_hub_data_set_has_a_configuration_and_an_evaluation_split() -> None:
    hub = DataSource(hub_name="org/set")
    configured = DataSource(hub_name="org/set", config="en")
    for section, found in (
        ({"train": "org/set", "eval": 0.1}, (hub, 0.1)),
        ({"train": "org/set", "eval": "org/set", "eval_split": "test"}, (hub, hub)),
        ({"train": "org/set", "eval": "org/set", "config": "en"}, (configured, configured)),
        ({"train": "org/set", "eval": "org/other", "config": "en"}, (configured, DataSource(hub_name="org/other"))),
    ):
        assert find_split_data(DataSection(**section)) == found
    train, held_out = find_split_data(DataSection(train="data/a.jsonl", eval="org/set", config="en", eval_split="test"))
    assert (names(train), held_out) == (["a.jsonl"], configured)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"train": "data/a.jsonl", "config": "en"}, "data.config"),
        ({"train": "org/set", "eval_split": "test"}, "data.eval_split"),
        ({"train": "org/set", "eval": 0.1, "eval_split": "test"}, "data.eval_split"),
        ({"train": "org/set", "eval": "data/a.jsonl", "eval_split": "test"}, "data.eval_split"),
        ({"train": "data/a.jsonl", "split": "train[:10]"}, "data.split"),
    ],
)
def test_a_key_for_hub_data_sets_is_rejected_if_it_has_no_effect(section: dict[str, Any], key: str) -> None:
    with pytest.raises(RequestError) as caught:
        find_split_data(DataSection(**section))
    assert [problem.key for problem in caught.value.problems] == [key]

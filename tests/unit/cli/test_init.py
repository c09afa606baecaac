"""What `launcher init` writes and rejects."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.job import load_job
from launcher.presets import preset_names, shipped_folder
from tests.unit.inputs import command, write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_valid_job_and_never_overwrites(folder: Path) -> None:
    ended = command("init", "new", "--model", "models/ä \U0001f600", "--data", "d/*.jsonl", "--name", "mine")
    assert ended.status == 0
    job = load_job(folder / "new/mine.yaml").job
    assert (job.name, job.model.name_or_path, job.data.train) == ("mine", "models/ä \U0001f600", "d/*.jsonl")
    for name in preset_names():
        copied = folder / f"new/ds_configs/{name}.json"
        assert copied.read_bytes() == (shipped_folder("ds_configs") / copied.name).read_bytes()
    assert str(job.deepspeed) in {f"ds_configs/{name}.json" for name in preset_names()}
    assert "next: cd new && launcher plan mine.yaml" in ended.out

    (folder / "new/mine.yaml").write_text("my own")
    before = {path: path.read_bytes() for path in (folder / "new").rglob("*") if path.is_file()}
    again = command("init", "new", "--name", "mine")
    assert again.status == 2
    assert "mine.yaml" in again.err
    assert "are not overwritten" in again.err
    assert {path: path.read_bytes() for path in (folder / "new").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("x", "--name", "a/b"), "name: must be letters"),
        (("x", "--name", "../up"), "name: must be letters"),
        (("x", "--model", "a\nb"), "model.name_or_path: must be text without line breaks"),
        (("x", "--data", ""), "data.train: must not be empty"),
        (("x", "--data", "a\x07b"), "data.train: must be text without line breaks"),
        (("job.yaml",), "this is a file; a folder is needed"),
    ],
)
def test_init_rejects_invalid_values(folder: Path, arguments: tuple[str, ...], says: str) -> None:
    before = set(folder.rglob("*"))
    ended = command("init", *arguments)
    assert ended.status == 2
    assert says in ended.err
    assert set(folder.rglob("*")) == before

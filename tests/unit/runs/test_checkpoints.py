"""Checkpoints that can be resumed and exported, and reports of damaged ones."""

from __future__ import annotations

import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher.errors import LauncherError, RequestError
from launcher.export_folder import export_fault
from launcher.manifest import MANIFEST, content_fault, universal_folder, write_manifest
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.runs import checkpoints
from launcher.runs.checkpoints import checkpoint_at, newest_verified, set_aside_if_idle
from launcher.runs.console import RunConsole
from launcher.runs.outcome import Outcome
from launcher.runs.rest import rest_as_planned, rest_of
from launcher.runs.resume_steps import _convert, report_damage
from tests.unit.inputs import command, plan_of

NEWEST, BEFORE = 8, 4


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with two checkpoints."""
    run = RunDir.create(tmp_path / "runs", "tiny")
    plan = plan_of()
    run.plan_file.write_text(plan.to_json())
    for update in (BEFORE, NEWEST):
        save(run, plan, update)
    return run


def save(run: RunDir, plan: Plan, update: int) -> None:
    folder = run.checkpoint(update)
    folder.mkdir()
    for name in ("model_states.pt", "optim_states.pt"):
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("data.pkl", bytes(1000))
    samples = update * plan.train_batch_size
    write_manifest(folder, update=update, samples=samples, world_size=plan.world.size, plan_sha256=plan.sha256)


def cut(folder: Path) -> None:
    (folder / "optim_states.pt").write_bytes((folder / "optim_states.pt").read_bytes()[:-1])


def zeros(folder: Path) -> None:
    (folder / "optim_states.pt").write_bytes(bytes((folder / "optim_states.pt").stat().st_size))


def end_is_zeros(folder: Path) -> None:
    data = (folder / "optim_states.pt").read_bytes()
    (folder / "optim_states.pt").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def other_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def flip_bit(file: Path, position: int = 500) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (str(self.file),)


def executed(folder: Path) -> Path:
    """The folder that a payload in this checkpoint creates."""
    return folder.parent / "executed"


def extra_pickle(folder: Path) -> None:
    (folder / "mp_rank_01_model_states.pt").write_bytes(pickle.dumps(Payload(executed(folder))))


def replaced_pickle(folder: Path) -> None:
    """Another archive of the same size."""
    file = folder / "optim_states.pt"
    size, payload = file.stat().st_size, pickle.dumps(Payload(executed(folder)))
    # The fixture's archive has 1000 bytes in an entry of this name.
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", payload.ljust(1000, b"\0"))
    assert file.stat().st_size == size


NOT_FINISHED = "it has no manifest.json: it was not saved completely"
DAMAGE = {
    "optim_states.pt has 1113 bytes instead of 1114": cut,
    "optim_states.pt is missing": lambda folder: (folder / "optim_states.pt").unlink(),
    "optim_states.pt is not a PyTorch file": zeros,
    "model_states.pt is missing": lambda folder: (folder / "model_states.pt").unlink(),
    NOT_FINISHED: lambda folder: (folder / MANIFEST).unlink(),
    "manifest.json is not valid JSON": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
    "manifest.json is not valid JSON ": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "manifest.json has no valid 'samples'": lambda folder: other_manifest(folder, samples="64"),
    "manifest.json has no valid 'plan_sha256'": lambda folder: other_manifest(folder, plan_sha256=None),
    "manifest.json has no valid 'world_size'": lambda folder: other_manifest(folder, world_size=True),
    "manifest.json belongs to update 3": lambda folder: other_manifest(folder, update=3),
    "manifest.json has no valid 'format'": lambda folder: other_manifest(folder, format=3),
}
CONTENT_DAMAGE = {
    "optim_states.pt has changed since it was saved": lambda folder: flip_bit(folder / "optim_states.pt"),
    "model_states.pt has changed since it was saved": lambda folder: flip_bit(folder / "model_states.pt"),
    "optim_states.pt has changed since it was saved: its checksum differs": replaced_pickle,
    "mp_rank_01_model_states.pt is not listed in manifest.json": extra_pickle,
    "states/link is not listed in manifest.json": lambda folder: link_to_folder(folder),
}
"""Damage that can only be found by reading the folder and its files."""


def link_to_folder(folder: Path) -> None:
    (folder / "states").mkdir()
    (folder / "states/link").symlink_to(folder.parent)


@pytest.mark.parametrize("reason", [*DAMAGE, *CONTENT_DAMAGE])
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_it_is_used(run: RunDir, reason: str) -> None:
    {**DAMAGE, **CONTENT_DAMAGE}[reason](run.checkpoint(NEWEST))
    assert rest_as_planned(run).start.update == (BEFORE if reason in DAMAGE else NEWEST)
    rest = rest_of(run, [], RunConsole())
    assert (rest.start.update, rest.saved.folder) == (BEFORE, run.checkpoint(BEFORE))
    with pytest.raises(RequestError, match=f"update-8 cannot be used: {reason.strip()}") as raised:
        checkpoint_at(run, NEWEST)
    assert f"updates: {BEFORE}" in str(raised.value)
    console = RunConsole(Console(width=500, record=True))
    report_damage(rest, run, console)
    printed = console.console.export_text()
    assert f"update-{NEWEST} cannot be used: {reason.strip()}" in printed
    assert f"; using update-{BEFORE} instead" in printed
    (event,) = run.events()
    assert (event["event"], event["checkpoint"], event["used"]) == ("checkpoint_damaged", "update-8", "update-4")
    assert event["reason"].startswith(reason.strip())
    assert not executed(run.checkpoint(NEWEST)).exists()
    assert run.complete_checkpoints() == [BEFORE]
    if reason == NOT_FINISHED:
        # The next save of this update removes it.
        assert event["renamed_to"] is None and run.checkpoint(NEWEST).is_dir()
        return
    assert event["renamed_to"] == "update-8.damaged-1" and "instead (renamed to update-8.damaged-1)" in printed
    assert not run.checkpoint(NEWEST).exists() and (run.checkpoints / "update-8.damaged-1").is_dir()
    assert run.damaged_checkpoints() == []
    assert rest_of(run, [], RunConsole()).damaged == ()


def test_each_damaged_checkpoint_keeps_its_folder(run: RunDir) -> None:
    """Also with its converted form, which must not be used for the next checkpoint of this update."""
    for k in (1, 2):
        universal_folder(run.checkpoint(NEWEST)).mkdir()
        flip_bit(run.checkpoint(NEWEST) / "model_states.pt")
        report_damage(rest_of(run, [], RunConsole()), run, RunConsole())
        found = {path.name for path in run.checkpoints.iterdir()}
        assert found >= {f"update-8.damaged-{k}", f"update-8-universal.damaged-{k}", "update-4"}
        assert not found & {"update-8", "update-8-universal"}
        save(run, plan_of(), NEWEST)


def test_a_checkpoint_of_an_earlier_version_is_checked_by_sizes(run: RunDir) -> None:
    sizes = {name: (run.checkpoint(NEWEST) / name).stat().st_size for name in ("model_states.pt", "optim_states.pt")}
    manifest = json.loads((run.checkpoint(NEWEST) / MANIFEST).read_text())
    (run.checkpoint(NEWEST) / MANIFEST).write_text(
        json.dumps(
            {key: value for key, value in manifest.items() if key not in ("format", "versions")} | {"files": sizes}
        )
    )
    assert rest_of(run, [], RunConsole()).start.update == NEWEST
    extra_pickle(run.checkpoint(NEWEST))
    assert rest_of(run, [], RunConsole()).start.update == BEFORE


def test_an_export_renames_a_damaged_checkpoint_only_if_no_launcher_runs(run: RunDir) -> None:
    flip_bit(run.checkpoint(NEWEST) / "model_states.pt")
    saved, (damaged,) = newest_verified(run, lambda _: None)
    with run.held():
        found: list[Path | None] = []
        thread = threading.Thread(target=lambda: found.append(set_aside_if_idle(run, damaged, saved)))
        thread.start()
        thread.join()
    assert found == [None] and run.checkpoint(NEWEST).is_dir() and not run.events()
    assert set_aside_if_idle(run, damaged, saved) == run.checkpoints / "update-8.damaged-1"


def test_an_export_does_not_rename_a_checkpoint_that_was_saved_again(run: RunDir) -> None:
    flip_bit(run.checkpoint(NEWEST) / "model_states.pt")
    saved, (damaged,) = newest_verified(run, lambda _: None)
    flip_bit(run.checkpoint(NEWEST) / "model_states.pt")
    assert set_aside_if_idle(run, damaged, saved) is None and run.checkpoint(NEWEST).is_dir()


def test_a_large_checkpoint_is_announced(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    newest_verified(run, notes.append)
    assert notes == []
    monkeypatch.setattr(checkpoints, "_LARGE_BYTES", 1000)
    newest_verified(run, notes.append)
    assert notes == [f"verifying update-{NEWEST} (0.0 GB)"]


@pytest.mark.parametrize("damage", [extra_pickle, lambda folder: (folder / MANIFEST).unlink(), None])
def test_a_conversion_is_verified(run: RunDir, damage: Callable[[Path], None] | None) -> None:
    """A damaged one is made again; here the converter then fails, since the checkpoint is not real."""
    universal = universal_folder(run.checkpoint(NEWEST))
    (universal / "zero/weight").mkdir(parents=True)
    (universal / "zero/weight/fp32.pt").write_bytes(b"weights")
    write_manifest(universal, update=NEWEST, samples=64, world_size=1, plan_sha256="0" * 64)
    if damage is None:
        _convert(run.checkpoint(NEWEST), run, RunConsole())
        assert content_fault(universal) is None
        return
    damage(universal)
    console = RunConsole(Console(width=500, record=True))
    (run.checkpoint(NEWEST) / MANIFEST).unlink()
    with pytest.raises(LauncherError, match="has no valid manifest"):
        _convert(run.checkpoint(NEWEST), run, console)
    assert "update-8-universal cannot be used: " in console.console.export_text()
    assert not universal.exists()


def test_a_file_whose_end_was_never_written_is_detected(run: RunDir) -> None:
    end_is_zeros(run.checkpoint(NEWEST))
    assert rest_as_planned(run).start.update == BEFORE


def test_an_older_damaged_checkpoint_is_not_reported(run: RunDir) -> None:
    cut(run.checkpoint(BEFORE))
    rest = rest_as_planned(run)
    assert (rest.start.update, rest.damaged) == (NEWEST, ())


def test_a_newer_checkpoint_may_have_a_lower_number(run: RunDir) -> None:
    """With a larger batch, the same number of samples takes fewer updates."""
    folder = run.checkpoint(BEFORE - 1)
    run.checkpoint(BEFORE).rename(folder)
    other_manifest(folder, update=BEFORE - 1, samples=10**6)
    zeros(folder)
    rest = rest_as_planned(run)
    assert [each.path for each in rest.damaged] == [folder]


def test_without_a_usable_checkpoint_each_damaged_one_is_reported(run: RunDir) -> None:
    for update in (BEFORE, NEWEST):
        zeros(run.checkpoint(update))
    ended = command("resume", str(run.path))
    assert ended.status == 2
    for update in (BEFORE, NEWEST):
        assert f"update-{update} cannot be used: optim_states.pt is not a PyTorch file" in ended.err


def finished(run: RunDir) -> int:
    """Saves the checkpoint of the last update and returns the number of updates."""
    plan = plan_of()
    total = plan.length.total_updates
    if total not in (BEFORE, NEWEST):
        save(run, plan, total)
    return total


def test_a_run_that_lacks_only_its_export_can_be_resumed(run: RunDir) -> None:
    total = finished(run)
    for overrides in ([], ["cluster.nodes=1"]):
        rest = rest_of(run, overrides, RunConsole())
        assert rest.only_export
        assert rest.saved.update == total
    complete_export(run.export)
    with pytest.raises(RequestError, match=f"all {total} updates were already made"):
        rest_of(run, [], RunConsole())


def test_a_run_that_ended_early_continues_only_if_more_updates_are_asked_for(run: RunDir) -> None:
    manifest = json.loads((run.checkpoint(NEWEST) / MANIFEST).read_text())
    (run.checkpoint(NEWEST) / MANIFEST).write_text(json.dumps({**manifest, "early_stop": "early stopping: why"}))
    rest = rest_of(run, ["cluster.nodes=1"], RunConsole())
    assert rest.only_export and rest.outcome == Outcome("finished", NEWEST, "early stopping: why")
    complete_export(run.export)
    with pytest.raises(RequestError, match=rf"the run ended after {NEWEST} updates \(early stopping: why\)") as error:
        rest_of(run, [], RunConsole())
    hint = "continue training with train.early_stopping=null, or export again with launcher export"
    assert error.value.problems[0].hint == hint


def complete_export(folder: Path, weights: str = "model.safetensors") -> Path:
    """A model folder whose safetensors file has one tensor of eight bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / weights).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return folder


def test_a_damaged_or_incomplete_export_is_reported(tmp_path: Path) -> None:
    folder = complete_export(tmp_path / "export")
    assert export_fault(folder) is None
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for content, fault in (
        (data[:-1], "model.safetensors is incomplete"),
        (data[:20], "model.safetensors is damaged"),
        (bytes(len(data)), "model.safetensors is damaged"),
        (b"", "model.safetensors is damaged"),
    ):
        weights.write_bytes(content)
        assert export_fault(folder) == fault
    weights.unlink()
    assert export_fault(folder) == "model.safetensors: No such file or directory"
    (folder / "config.json").unlink()
    assert export_fault(folder) == "it has neither a config.json nor an adapter_config.json"
    assert export_fault(tmp_path / "nowhere") == "it does not exist"


def test_an_export_needs_every_file_of_its_index(tmp_path: Path) -> None:
    folder = complete_export(tmp_path / "export", "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert export_fault(folder) == "model-00002-of-00002.safetensors: No such file or directory"
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')
    assert export_fault(folder) == "model.safetensors.index.json is damaged"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--update", "5"), "update-5 cannot be used: it does not exist"),
        (("--update", "5"), f"usable checkpoints are those of updates: {BEFORE}, {NEWEST}"),
        (("--dtype", "bfloat15"), "did you mean bfloat16?"),
        (("--dtype", "int8"), "one of float32, bfloat16, float16"),
        (("--merge",), "this run has no LoRA adapters to merge"),
        (("--output", "taken"), "this already exists"),
    ],
)
def test_an_export_that_cannot_be_made_is_rejected(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(run.path.parent)
    Path("taken").mkdir()
    Path("taken/of_the_user").touch()
    ended = command("export", str(run.path), *arguments)
    assert (ended.status, says in ended.err) == (2, True), ended.err
    assert not list(run.path.glob("*export*"))

"""Checkpoints that can be resumed and exported, and reports of damaged ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from launcher.errors import RequestError
from launcher.export_folder import export_fault
from launcher.manifest import MANIFEST, write_manifest
from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.runs.checkpoints import checkpoint_at
from launcher.runs.console import RunConsole
from launcher.runs.rest import rest_as_planned, rest_of
from launcher.runs.resume import _report_damage
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


DAMAGE = {
    "optim_states.pt has 1113 bytes instead of 1114": cut,
    "optim_states.pt is missing": lambda folder: (folder / "optim_states.pt").unlink(),
    "optim_states.pt is not a PyTorch file": zeros,
    "model_states.pt is missing": lambda folder: (folder / "model_states.pt").unlink(),
    "it has no manifest.json: it was not saved completely": lambda folder: (folder / MANIFEST).unlink(),
    "manifest.json is not valid JSON": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
    "manifest.json has no valid 'samples'": lambda folder: other_manifest(folder, samples="64"),
    "manifest.json has no valid 'plan_sha256'": lambda folder: other_manifest(folder, plan_sha256=None),
    "manifest.json has no valid 'world_size'": lambda folder: other_manifest(folder, world_size=True),
    "manifest.json belongs to update 3": lambda folder: other_manifest(folder, update=3),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(run: RunDir, reason: str) -> None:
    DAMAGE[reason](run.checkpoint(NEWEST))
    rest = rest_as_planned(run)
    assert (rest.start.update, rest.saved.folder) == (BEFORE, run.checkpoint(BEFORE))
    console = RunConsole(Console(width=500, record=True))
    _report_damage(rest, run, console)
    assert f"update-{NEWEST} cannot be used: {reason}; using update-{BEFORE} instead" in console.console.export_text()
    (event,) = run.events()
    assert (event["event"], event["checkpoint"], event["used"]) == ("checkpoint_damaged", "update-8", "update-4")
    assert event["reason"] == reason
    with pytest.raises(RequestError, match=f"update-8 cannot be used: {reason}"):
        checkpoint_at(run, NEWEST)


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

"""`launcher lr` on jobs, DeepSpeed JSONs and run directories: output, files and errors."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.revision import with_longer_warmup
from launcher.run_dir import RunDir, append_line, write_atomic
from launcher.schedule.curve import deepspeed_blocks, lr_at, lr_curve, make_schedule
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed
from tests.unit.inputs import command, data_facts, job_of, model_facts, plan_of, remember, write_folder

THOUSAND = ("train.max_steps=1000", "schedule.shape=linear", "schedule.peak_lr=2e-5", "schedule.warmup=100")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def known(folder: Path) -> Path:
    """The job file, with cached measurements of its model and data."""
    remember(folder / "job.yaml", (), model_facts(parameters=1_000_000), data_facts(320))
    return folder / "job.yaml"


def as_json(*arguments: str) -> dict[str, Any]:
    ended = command("lr", *arguments, "--json")
    assert ended.status == 0, ended.err
    document: dict[str, Any] = json.loads(ended.out)
    return document


def write_json(path: Path, **document: Any) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def decay_json(path: Path, **params: Any) -> str:
    optimizer = {"type": "AdamW", "params": {"lr": 2e-5}}
    return write_json(path, optimizer=optimizer, scheduler={"type": "WarmupDecayLR", "params": params})


def test_a_schedule_of_a_thousand_updates_has_exact_values(known: Path) -> None:
    found = as_json(str(known), *THOUSAND)
    (curve,) = found["curves"]
    low = 2e-5 / 101
    ramp = [low + (2e-5 - low) * (update / 100) for update in range(100)]
    decay = [low + (2e-5 - low) * ((1000 - update) / 900.0) for update in range(100, 1000)]
    assert curve["rates"] == ramp + decay
    assert curve["rates"] == lr_curve(make_schedule("linear", peak_lr=2e-5, warmup_updates=100, total_updates=1000))
    assert (curve["rates"][0], curve["rates"][100]) == (1.9801980198019803e-07, 2e-5)
    assert (curve["highest_update"], curve["half_update"], curve["at_floor"]) == (100, 50, 1)
    assert [point["update"] for point in found["points"]] == [0, 50, 100, 500, 555, 999]
    assert found["blocks"]["scheduler"] == {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 1000,
            "warmup_num_steps": 100,
            "warmup_type": "linear",
            "warmup_min_lr": low,
            "warmup_max_lr": 2e-5,
        },
    }
    assert found["blocks"]["optimizer"]["params"]["lr"] == 2e-5


def test_a_job_is_printed_in_80_columns_without_colour(known: Path) -> None:
    ended = command("lr", str(known), *THOUSAND)
    assert ended.status == 0
    assert "\x1b" not in ended.out
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    assert ended.out.splitlines()[0] == "job: linear, 1,000 updates, 100 of warm-up"
    assert any(0x2800 < ord(character) < 0x2900 for character in ended.out)
    words = " ".join(ended.out.split())
    for said in (
        "100 2.000e-05 100.0% peak",
        "in updates at the peak 505.0",
        "updates at the floor 1",
        "schedule.warmup in the job is 100.",
        "every learning rate comes one update later: updates 0 and 1 both use 1.98e-07",
        "engine.lr_scheduler.step() once after a fresh deepspeed.initialize",
        '"warmup_max_lr": 2e-05',
    ):
        assert said in words


def test_the_blocks_can_be_pasted_from_the_output(known: Path) -> None:
    out = command("lr", str(known), *THOUSAND).out
    pasted = json.loads(out[out.index("\n{\n") :])
    assert pasted == as_json(str(known), *THOUSAND)["blocks"]


def test_every_choice_has_a_reason_a_range_and_sources(known: Path) -> None:
    out = " ".join(command("lr", str(known), "train.max_steps=1000").out.split())
    for said in ("peak lr", "40% quantile of published full", "[recipes.csv", "(heuristic)", "Mosbach et al."):
        assert said in out
    for said in ("To settle the peak on your data, run the job with each of schedule.peak_lr=", "beta2 0.999: If you"):
        assert said in out
    reasons = {reason["choice"]: reason for reason in as_json(str(known), "train.max_steps=1000")["reasons"]}
    assert set(reasons) == {"peak_lr", "warmup", "shape", "floor", "sweep", "beta2"}
    assert reasons["peak_lr"]["low"] < reasons["peak_lr"]["value"] <= reasons["peak_lr"]["high"]


def test_shapes_are_compared_and_written_as_csv(known: Path, folder: Path) -> None:
    ended = command("lr", str(known), *THOUSAND, "--compare", "linear,cosine,wsd", "--csv", "out.csv")
    assert ended.status == 0
    assert "linear" in ended.out and "ooo cosine" in ended.out and "xxx wsd" in ended.out
    with (folder / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["update", "linear", "cosine", "wsd"]
    for shape in ("linear", "cosine", "wsd"):
        schedule = make_schedule(shape, peak_lr=2e-5, warmup_updates=100, total_updates=1000)
        assert [float(row[shape]) for row in rows] == lr_curve(schedule)
    assert as_json(str(known), *THOUSAND, "--compare", "cosine")["curves"][1]["floor_lr"] == 2e-5 * 0.1


def test_a_shape_without_a_deepspeed_scheduler_has_no_block(known: Path) -> None:
    found = as_json(str(known), "train.max_steps=100", "schedule.shape=wsd", "schedule.warmup=10")
    assert "scheduler" not in found["blocks"]
    assert "no scheduler class for the shape wsd" in found["blocks_notes"][0]
    assert {80: "linear to 0 of the peak"}.items() <= {
        p["update"]: p["what"].split(", ")[-1] for p in found["points"]
    }.items()


def test_a_linear_schedule_to_zero_is_shown_without_a_block(known: Path) -> None:
    keys = ("train.max_steps=100", "schedule.shape=linear", "schedule.warmup=10", "schedule.floor=0")
    found = as_json(str(known), *keys)
    assert "scheduler" not in found["blocks"]
    assert found["blocks_notes"][0].startswith("WarmupDecayLR cannot end below its first learning rate")
    (curve,) = found["curves"]
    assert curve["floor_lr"] == 0.0 < min(curve["rates"])
    assert curve["rates"][-1] == pytest.approx(curve["highest_lr"] / 90)


def test_a_png_is_written(known: Path, folder: Path) -> None:
    ended = command("lr", str(known), *THOUSAND, "--png", "out.png")
    assert (ended.status, "wrote out.png" in ended.err) == (0, True)
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_missing_matplotlib_is_reported_with_a_hint(
    known: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = command("lr", str(known), *THOUSAND, "--png", "out.png")
    assert ended.status == 2
    assert "pip install matplotlib" in ended.err
    assert not (folder / "out.png").exists()


def test_the_users_scheduler_is_shown_as_deepspeed_applies_it(known: Path, folder: Path) -> None:
    params = {"total_num_steps": 40, "warmup_num_steps": 4}
    name = decay_json(folder / "ds.json", **params)
    found = as_json(str(known), "train.max_steps=40", f"deepspeed={name}", "schedule.allow_unsafe=true")
    assert found["curves"][0]["rates"] == simulate_deepspeed("WarmupDecayLR", params, 2e-5, 40)
    assert any("Updates 0 and 1 both use 0" in warning for warning in found["warnings"])
    assert found["blocks_notes"] == ["The scheduler is your own: DeepSpeed starts and steps it, here as in any script."]


def test_a_deepspeed_json_is_shown_as_the_engine_applies_it(folder: Path) -> None:
    name = decay_json(folder / "ds.json", total_num_steps=1000, warmup_num_steps=100)
    found = as_json("--deepspeed", name)
    written, fixed = found["curves"]
    params = {"total_num_steps": 1000, "warmup_num_steps": 100}
    assert written["rates"] == simulate_deepspeed("WarmupDecayLR", params, 2e-5, 1000)
    assert (written["at_floor"], written["floor_lr"], written["highest_lr"]) == (2, 0.0, 1e-3)
    schedule = make_schedule("linear", peak_lr=2e-5, warmup_updates=100, total_updates=1000)
    assert fixed["rates"] == lr_curve(schedule)
    assert found["blocks"]["scheduler"] == deepspeed_blocks(schedule)["scheduler"]
    said = " ".join(found["warnings"])
    for words in ("Updates 0 and 1 both use 0", "log ramp is the default", "DeepSpeed's default 0.001"):
        assert words in said
    assert [point["what"] for point in found["points"]][1:3] == ["after step 1: i = 0", "after step 2: i = 1"]
    out = " ".join(command("lr", "--deepspeed", name).out.split())
    assert "0 0.000e+00 0.0% 1.980e-07 first update, set by the constructor" in out
    assert "so it ends at 1.98e-07. In a job file, schedule.floor: 0 decays to zero." in out


def test_the_length_comes_from_the_json_or_from_updates(folder: Path) -> None:
    name = decay_json(folder / "ds.json", total_num_steps=100, warmup_num_steps=10, warmup_type="linear")
    assert len(as_json("--deepspeed", name)["curves"][0]["rates"]) == 100
    longer = as_json("--deepspeed", name, "--updates", "150")
    assert len(longer["curves"][0]["rates"]) == 150
    assert any("The decay ends at update 100" in warning for warning in longer["warnings"])
    assert longer["blocks"]["scheduler"]["params"]["total_num_steps"] == 150


def test_the_proposed_blocks_keep_the_floor_of_a_cosine_json(folder: Path) -> None:
    params = {"total_num_steps": 200, "warmup_num_steps": 20, "cos_min_ratio": 0.05}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.1}}
    name = write_json(folder / "ds.json", optimizer=optimizer, scheduler={"type": "WarmupCosineLR", "params": params})
    found = as_json("--deepspeed", name)
    schedule = make_schedule("cosine", peak_lr=1e-5, warmup_updates=20, total_updates=200, floor=0.05)
    assert found["curves"][1]["rates"] == lr_curve(schedule)
    assert found["blocks"]["optimizer"] == optimizer
    assert "update 0 uses 0, and update 1 uses 4.762e-07" in found["blocks_notes"][1]


def test_auto_values_are_explained(folder: Path) -> None:
    auto = dict.fromkeys(("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    name = decay_json(folder / "ds.json", **auto)
    refused = command("lr", "--deepspeed", name, "--updates", "50")
    assert refused.status == 2
    assert "scheduler.params.warmup_num_steps" in refused.err and "filled in by transformers" in refused.err
    found = as_json("--deepspeed", name, "--updates", "50", "scheduler.params.warmup_num_steps=5")
    params = {"total_num_steps": 50, "warmup_min_lr": 0, "warmup_max_lr": 2e-5, "warmup_num_steps": 5}
    assert found["curves"][0]["rates"] == simulate_deepspeed("WarmupDecayLR", params, 2e-5, 50)
    assert len(found["notes"]) == 3


def test_a_json_without_a_scheduler_is_explained(folder: Path) -> None:
    name = write_json(folder / "ds.json", optimizer={"type": "AdamW", "params": {"lr": 3e-5}})
    found = as_json("--deepspeed", name, "--updates", "7")
    assert found["curves"][0]["rates"] == [3e-5] * 7
    assert "no scheduler block" in found["warnings"][0]


def test_schedulers_without_proposed_blocks_are_shown(folder: Path) -> None:
    params = {"cycle_min_lr": 1e-6, "cycle_max_lr": 1e-5, "cycle_first_step_size": 10}
    name = write_json(folder / "ds.json", scheduler={"type": "OneCycle", "params": params})
    found = as_json("--deepspeed", name, "--updates", "30")
    assert found["curves"][0]["rates"] == simulate_deepspeed("OneCycle", params, 1e-3, 30)
    assert (found["blocks"], len(found["curves"])) == (None, 1)
    short = decay_json(folder / "short.json", total_num_steps=10, warmup_num_steps=20)
    assert "is not shorter than the run of 10" in as_json("--deepspeed", short)["blocks_notes"][0]


def test_a_run_shows_the_planned_extended_and_applied_curves(folder: Path) -> None:
    plan = plan_of(job_of(train={"max_steps": 100}, schedule={"shape": "cosine", "peak_lr": 2e-5, "warmup": 10}))
    longer = with_longer_warmup(plan, 20)
    run = RunDir.create(folder / "runs", "tiny")
    write_atomic(run.plan_file, plan.to_json())
    write_atomic(run.path / "plan.revision-1.json", longer.to_json())
    run.event({"event": "warmup_extended", "update": 20, "warmup_updates": 40, "peak_lr": 2e-5})
    schedule = make_schedule("cosine", peak_lr=2e-5, warmup_updates=10, total_updates=100)
    for update in range(20):
        append_line(run.metrics_file, {"update": update, "lr": lr_at(schedule, update)})
    found = as_json(str(run.path))
    assert [curve["name"] for curve in found["curves"]] == ["extended at 20", "planned", "applied"]
    assert found["curves"][1]["rates"] == lr_curve(schedule)
    assert found["curves"][2]["updates"] == list(range(20))
    assert found["curves"][2]["rates"] == lr_curve(schedule)[:20]
    assert found["blocks_notes"] == [
        "The blocks have the present warm-up; the curve before it was lengthened is not in them."
    ]
    assert found["blocks"]["scheduler"]["params"]["warmup_num_steps"] == 40
    ended = command("lr", str(run.path))
    for said in ("warm-up now 40 updates", "lengthened to 40 updates", "all at exactly the planned learning rate"):
        assert said in " ".join(ended.out.split())
    assert max(len(line) for line in ended.out.splitlines()) <= 80


WARMUP = {"total_num_steps": 10, "warmup_num_steps": 2}


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ({"type": "WarmupDekayLR", "params": {}}, ("scheduler.type", "did you mean WarmupDecayLR?")),
        ({"type": "CosineAnnealingLR", "params": {}}, ("not one of DeepSpeed's schedulers",)),
        ({"params": {}}, ("expected a block",)),
        ("WarmupLR", ("expected a block",)),
        ({"type": "WarmupLR", "params": 3}, ("scheduler.params", "found 3")),
        ({"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}, ("total_num_steps is required",)),
        ({"type": "WarmupDecayLR", "params": {**WARMUP, "warmup_num_stps": 1}}, ("did you mean warmup_num_steps?",)),
        ({"type": "WarmupDecayLR", "params": {**WARMUP, "warmup_num_steps": 0}}, ("positive integer, found 0",)),
        ({"type": "WarmupDecayLR", "params": {**WARMUP, "warmup_max_lr": "big"}}, ("must be a number, found 'big'",)),
        ({"type": "WarmupCosineLR", "params": WARMUP}, ("optimizer.params.lr", "is not in this JSON")),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 1e-5}}, ("--updates N",)),
        ({"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}}, ("--updates N",)),
        (None, ("optimizer.params.lr", "no scheduler sets one")),
    ],
    ids=str,
)
def test_a_json_without_a_valid_curve_is_rejected_with_its_location(
    folder: Path, scheduler: Any, says: tuple[str, ...]
) -> None:
    document = {"scheduler": scheduler} if scheduler is not None else {}
    ended = command("lr", "--deepspeed", write_json(folder / "ds.json", **document))
    assert ended.status == 2
    assert "ds.json" in ended.err and "Traceback" not in ended.err
    for words in says:
        assert words in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "a job file, a run directory or a DeepSpeed JSON is needed"),
        (("missing.yaml",), "job file not found"),
        (("--deepspeed", "missing.json"), "missing.json: --deepspeed: file not found"),
        (("data",), "so it is not a run directory"),
        (("model/config.json",), "launcher lr --deepspeed model/config.json"),
        (("job.yaml", "--updates", "3"), "train.max_steps=N"),
        (("job.yaml", "--compare", "linear,cosin"), "did you mean cosine?"),
        (("job.yaml", "--compare", "zigzag"), "one or more of linear, cosine"),
        (("job.yaml", "--compare", ""), "unknown shape ''"),
        (("--deepspeed", "model/config.json", "job.yaml"), "'job.yaml' is not a setting"),
        (("job.yaml", "--csv", "nowhere/x.csv"), "nowhere/x.csv: --csv: cannot be written"),
        (("job.yaml", "--png", "data"), "data: --png: cannot be written"),
        (("job.yaml", "schedule.peek_lr=1"), "peak_lr"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("known")
def test_invalid_input_exits_with_status_2(arguments: tuple[str, ...], says: str) -> None:
    ended = command("lr", *arguments)
    assert ended.status == 2
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_the_plan_of_a_run_takes_no_overrides(folder: Path) -> None:
    run = RunDir.create(folder / "runs", "tiny")
    write_atomic(run.plan_file, plan_of().to_json())
    ended = command("lr", str(run.path), "train.max_steps=3")
    assert (ended.status, "the plan of a run is fixed" in ended.err) == (2, True)

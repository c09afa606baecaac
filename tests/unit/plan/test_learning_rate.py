"""The learning rate of a plan where the user's DeepSpeed JSON has a scheduler: filled, kept or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.ds_config import from_mapping
from launcher.errors import RequestError
from launcher.plan.inputs import plan_inputs
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.resolve import check_inputs
from tests.unit.inputs import (
    Ended,
    command,
    data_facts,
    job_of,
    machine_facts,
    model_facts,
    plan_of,
    remember,
    write_folder,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_folder(tmp_path)
    return tmp_path


def launch(text: str, *overrides: str, verb: str = "plan") -> Ended:
    """Runs `launcher VERB` on the job with `text` as ds.json."""
    Path("ds.json").write_text(text)
    return command(verb, "job.yaml", "deepspeed=ds.json", *overrides)


SCHEDULER = '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}, "scheduler": {"type": "WarmupDecayLR", "params": '
SCHEDULER += '{"warmup_max_lr": 1e-5, "warmup_type": "linear",\n"warmup_num_steps": 5, "total_num_steps": 500}}}'
TEMPLATE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "my_tool": {"keeps": ["this"]},
}
WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")


@pytest.mark.parametrize(
    ("kind", "names", "shape"),
    [("WarmupLR", WARMUP, "constant"), ("WarmupDecayLR", (*WARMUP, "total_num_steps"), "linear")],
)
def test_a_template_of_transformers_is_filled_in(kind: str, names: tuple[str, ...], shape: str) -> None:
    user = {**TEMPLATE, "scheduler": {"type": kind, "params": dict.fromkeys(names, "auto")}}
    plan = plan_of(job_of(train={"max_steps": 100}, schedule={"warmup": 7}), user=user)
    config = plan.ds_config
    assert '"auto"' not in json.dumps(config)
    assert (plan.learning_rate.shape, plan.learning_rate.warmup_updates) == (shape, 7)
    assert config["scheduler"]["type"] == kind
    assert config["scheduler"]["params"]["warmup_num_steps"] == 7
    assert config["scheduler"]["params"]["warmup_type"] == "linear"
    assert config["scheduler"]["params"]["warmup_max_lr"] == config["optimizer"]["params"]["lr"]
    kept = ("my_tool", "wall_clock_breakdown")
    assert {key: config[key] for key in kept} == {key: user[key] for key in kept}
    changed = {change.key for change in plan.ds_config_changes}
    assert not any(key.startswith(kept) for key in changed)
    assert {"optimizer.params.lr", "scheduler.params.warmup_type", "zero_optimization.reduce_bucket_size"} <= changed


def test_a_scheduler_with_some_auto_params_is_kept_and_filled_in() -> None:
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-6, "warmup_num_steps": "auto", "warmup_type": "linear"}
    user = {"scheduler": {"type": "WarmupDecayLR", "params": {**params, "total_num_steps": "auto"}}}
    plan = plan_of(job_of(train={"max_steps": 100}, schedule={"warmup": 7}), user=user)
    made = {**params, "warmup_num_steps": 7, "total_num_steps": 100}
    assert plan.ds_config["scheduler"]["params"] == made
    assert (plan.learning_rate.schedule, plan.learning_rate.advance) == (None, 0)
    assert "warmup_max_lr" not in {change.key.rpartition(".")[2] for change in plan.ds_config_changes}


@pytest.mark.usefixtures("folder")
def test_an_unsafe_scheduler_needs_allow_unsafe() -> None:
    text = SCHEDULER.replace('"warmup_max_lr": 1e-5, ', "")
    assert "no warmup_max_lr: WarmupDecayLR peaks at 1e-3" in launch(text).err
    remember(Path("job.yaml"), ("train.max_steps=500",), model_facts(), data_facts())
    ended = launch(text, "train.max_steps=500", "schedule.allow_unsafe=true")
    assert ended.status == 0, ended.err
    assert "note: ds.json:1: scheduler.params: no warmup_max_lr" in ended.out


def test_the_safety_rules_apply_to_a_scheduler_of_the_user() -> None:
    user = {
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-6}},
    }
    with pytest.raises(RequestError, match="log"):
        plan_of(job_of(train={"max_steps": 100}), user=user)


def own(total: object, **params: object) -> dict[str, Any]:
    """A JSON with a scheduler and an optimizer."""
    lrs = {"warmup_min_lr": 0, "warmup_max_lr": 1e-6, "warmup_num_steps": 5, "warmup_type": "linear"}
    scheduler = {"type": "WarmupDecayLR", "params": {**lrs, "total_num_steps": total, **params}}
    return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-6}}, "scheduler": scheduler}


def plan_error(user: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(RequestError) as caught:
        plan_of(job_of(**sections), user=user, data=data_facts(10_000))
    return str(caught.value)


@pytest.mark.parametrize("train", [{"num_train_epochs": 3}, {"total_samples": 30_000}])
def test_a_scheduler_for_another_length_is_an_error(train: dict[str, Any]) -> None:
    (key, value), *_ = train.items()
    error = plan_error(own(200), train=train)
    assert f"train.{key}: {value}" in error
    assert "in the job gives 938 updates, but total_num_steps is 200 in ds.json" in error
    assert 'set total_num_steps to 938 or "auto"' in error
    for total in (938, "auto"):
        plan = plan_of(job_of(train=train), user=own(total), data=data_facts(10_000))
        assert plan.ds_config["scheduler"]["params"]["total_num_steps"] == plan.length.total_updates == 938


def test_updates_at_learning_rate_0_need_allow_unsafe_if_the_job_sets_no_length() -> None:
    error = plan_error(own(200))
    assert (
        "scheduler.params.total_num_steps: 112 of the run's 313 updates have learning rate 0 and train nothing" in error
    )
    assert "schedule.allow_unsafe: true" in error
    plan = plan_of(job_of(schedule={"allow_unsafe": True}), user=own(200), data=data_facts(10_000))
    lr_of = planned_lrs(plan)
    assert [lr_of(update) for update in range(313)][5:].count(0.0) == 112
    assert plan_of(job_of(), user=own(400), data=data_facts(10_000)).length.total_updates == 313


@pytest.mark.usefixtures("folder")
def test_errors_of_a_scheduler_have_its_line() -> None:
    remember(Path("job.yaml"), (), model_facts(), data_facts())
    text = json.dumps(own(200, warmup_num_steps=40), indent=1)
    line = 1 + text[: text.index('"total_num_steps"')].count("\n")
    job = ("train.max_steps=300", "schedule.warmup=30")
    error = launch(text, *job).err
    assert f"train.max_steps: 300 in the job, but total_num_steps is 200 in ds.json:{line}" in error
    assert "schedule.warmup: the WarmupDecayLR in ds.json:8 does not use it" in error
    remember(Path("job.yaml"), ("train.max_steps=200",), model_facts(), data_facts())
    ramp = json.dumps(own(200, warmup_num_steps=40, warmup_max_lr=1e-2, warmup_min_lr=0), indent=1)
    error = launch(ramp, "train.max_steps=200").err
    assert "ds.json:12: scheduler.params.warmup_max_lr: a peak of 0.01 is high for full training" in error


def test_an_equal_warm_up_in_job_and_json_does_not_conflict() -> None:
    sections: dict[str, Any] = {"train": {"max_steps": 100}, "schedule": {"warmup": 5, "warmup_type": "linear"}}
    assert plan_of(job_of(**sections), user=own(100)).ds_config["scheduler"]["params"]["warmup_num_steps"] == 5
    assert "schedule.warmup: the WarmupDecayLR in ds.json does not use it" in plan_error(
        own(100), **{**sections, "schedule": {"warmup": 6}}
    )


def test_an_auto_warm_up_is_linear_and_reported() -> None:
    user = own("auto", warmup_num_steps="auto")
    del user["scheduler"]["params"]["warmup_type"]
    job = job_of(train={"max_steps": 100}, schedule={"warmup_type": "linear"})
    check_inputs(plan_inputs(job, from_mapping(user, "ds.json"), machine_facts(8)))
    plan = plan_of(job, user=user)
    assert plan.ds_config["scheduler"]["params"]["warmup_type"] == "linear"
    (change,) = (one for one in plan.ds_config_changes if one.key == "scheduler.params.warmup_type")
    assert "steep log ramp" in change.reason


COSINE = {"total_num_steps": "auto", "warmup_num_steps": 5, "warmup_min_ratio": "auto", "warmup_type": "linear"}


def test_a_cosine_of_the_user_without_a_peak_gets_the_advised_peak() -> None:
    user = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": ["auto", "auto"]}},
        "scheduler": {"type": "WarmupCosineLR", "params": {**COSINE, "cos_min_ratio": 0.2}},
    }
    advised = plan_of(job_of(train={"max_steps": 100})).learning_rate.peak_lr
    plan = plan_of(job_of(train={"max_steps": 100}), user=user)
    optimizer, scheduler = (plan.ds_config[name]["params"] for name in ("optimizer", "scheduler"))
    assert (optimizer["lr"], optimizer["betas"]) == (advised, [0.9, 0.999])
    assert (scheduler["warmup_min_ratio"], scheduler["cos_min_ratio"], scheduler["total_num_steps"]) == (0.0, 0.2, 100)
    assert plan.learning_rate.peak_lr == pytest.approx(advised, rel=1e-3)
    assert plan.learning_rate.reasons[0].choice == "peak_lr"
    assert plan.learning_rate.reasons[0].sources


def test_an_auto_floor_is_that_of_a_cosine() -> None:
    user = {"scheduler": {"type": "WarmupCosineLR", "params": {**COSINE, "cos_min_ratio": "auto"}}}
    plan = plan_of(job_of(train={"max_steps": 100}), user=user)
    assert plan.ds_config["scheduler"]["params"]["cos_min_ratio"] == 0.1


@pytest.mark.parametrize(("lr", "words"), [(0, "must be above 0"), (1, "a peak of 1 is high")])
def test_an_unsafe_peak_of_the_jsons_optimizer_is_reported_at_its_key(lr: float, words: str) -> None:
    user = {"optimizer": {"type": "AdamW", "params": {"lr": lr}}}
    error = plan_error(user, train={"max_steps": 100})
    assert error.startswith("ds.json: optimizer.params.lr: ")
    assert words in error
    own_peak = plan_error(user, train={"max_steps": 100}, schedule={"peak_lr": 0.5})
    assert own_peak.startswith("schedule.peak_lr: ")


def test_a_run_at_learning_rate_0_gets_no_hint_about_its_length() -> None:
    user = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0, "warmup_num_steps": 2}}}
    user["scheduler"]["params"]["warmup_type"] = "linear"
    error = plan_error(user, train={"max_steps": 100})
    assert "100 of the run's 100 updates have learning rate 0" in error
    assert "set a learning rate above 0" in error


ZERO: dict[str, Any] = {"shape": "linear", "warmup": 10, "floor": 0}


def test_a_linear_schedule_to_zero_is_passed_as_an_object() -> None:
    plan = plan_of(job_of(schedule=ZERO))
    assert "scheduler" not in plan.ds_config
    assert plan.learning_rate.floor_lr == 0.0
    planned, updates = planned_lrs(plan), plan.length.total_updates
    assert planned(0) == pytest.approx(plan.learning_rate.peak_lr / 11)
    assert planned(updates) == 0.0 < planned(updates - 1)
    assert "schedule.floor in the job is 0 of the peak." in [reason.reason for reason in plan.learning_rate.reasons]


def test_a_linear_schedule_to_zero_replaces_a_scheduler_whose_params_are_auto() -> None:
    names = ("total_num_steps", "warmup_num_steps", "warmup_max_lr", "warmup_min_lr")
    user = {"scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}}
    plan = plan_of(job_of(schedule={"warmup": 10, "floor": 0}), user)
    assert "scheduler" not in plan.ds_config
    assert planned_lrs(plan)(plan.length.total_updates) == 0.0
    reasons = [change.reason for change in plan.ds_config_changes if change.key == "scheduler"]
    assert reasons == ["schedule.floor in the job sets a generated schedule, which is passed as an object"]


@pytest.mark.usefixtures("folder")
def test_lint_accepts_an_auto_scheduler_that_a_floor_of_zero_replaces() -> None:
    keys = ("train.max_steps=100", "schedule.warmup=10", "schedule.floor=0", "schedule.peak_lr=1e-5")
    remember(Path("job.yaml"), keys, model_facts(), data_facts())
    names = ("total_num_steps", "warmup_num_steps", "warmup_max_lr", "warmup_min_lr")
    text = json.dumps({"scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}})
    ended = launch(text, *keys)
    assert ended.status == 0, ended.err
    assert "linear: up to 1e-05 in 10 updates of warm-up, then to 1.11e-07 at the last of 100" in ended.out
    assert "schedule.floor in the job sets a generated schedule" in " ".join(ended.out.split())


def test_a_floor_of_zero_does_not_apply_to_a_scheduler_of_the_user() -> None:
    user = own(500, warmup_num_steps=5)
    error = plan_error(user, schedule={"floor": 0})
    assert "schedule.floor: the WarmupDecayLR" in error
    assert "set schedule.shape to generate a schedule" in error
    plan = plan_of(job_of(schedule=ZERO), user)
    assert "scheduler" not in plan.ds_config
    assert planned_lrs(plan)(plan.length.total_updates) == 0.0


@pytest.mark.parametrize("params", [{}, {"lr": 1e-5, "betas": [0.9, 0.95]}, {"lr": 1e-5, "betas": "auto"}])
def test_the_warm_up_follows_the_beta2_that_applies(params: dict[str, Any]) -> None:
    user = {"optimizer": {"type": "AdamW", "params": params}} if params else {}
    plan = plan_of(job_of(train={"betas": (0.9, 0.98)}) if "auto" in params.values() else job_of(), user)
    beta2 = {reason.choice: reason for reason in plan.learning_rate.reasons}["beta2"]
    assert beta2.value == plan.ds_config["optimizer"]["params"]["betas"][1]


def test_a_plan_with_an_advised_peak_names_the_sweep_that_would_settle_it() -> None:
    reasons = {reason.choice: reason for reason in plan_of(job_of(schedule={})).learning_rate.reasons}
    assert "schedule.peak_lr=" in reasons["sweep"].reason
    fixed = plan_of(job_of(schedule={"peak_lr": 1e-5})).learning_rate.reasons
    assert "sweep" not in {reason.choice for reason in fixed}


def test_the_advice_depends_on_the_family_and_on_loras_alpha() -> None:
    def peak(facts: dict[str, Any], **of_model: Any) -> float:
        model = model_facts().model_copy(update=facts)
        machine = machine_facts(8, versions={"deepspeed": "0.19.8", "peft": "0.17.0"})
        return plan_of(job_of(model=of_model), model=model, machine=machine).learning_rate.peak_lr

    llama2 = {"model_type": "llama", "vocab_size": 32_000}
    assert peak({"model_type": "qwen3"}) == peak(llama2) / 2
    assert peak(llama2, lora={"r": 16}) == peak(llama2, lora={"r": 64, "alpha": 32}) == 3e-4
    assert peak(llama2, lora={"r": 128}) == 3e-5


def test_auto_ratios_and_starts_are_filled() -> None:
    user = {"scheduler": {"type": "WarmupCosineLR", "params": {**COSINE, "cos_min_ratio": "auto"}}}
    user["scheduler"]["params"]["last_batch_iteration"] = "auto"
    job = job_of(train={"max_steps": 100}, schedule={"floor": 0.25})
    check_inputs(plan_inputs(job, from_mapping(user, "ds.json"), machine_facts(8)))
    params = plan_of(job, user=user).ds_config["scheduler"]["params"]
    assert (params["warmup_min_ratio"], params["last_batch_iteration"]) == (0.0, -1)
    assert params["cos_min_ratio"] == 0.25

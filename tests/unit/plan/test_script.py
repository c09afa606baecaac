"""The plan of a user's script, and `launcher exec` before it starts anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from launcher.ds_config import from_mapping
from launcher.errors import RequestError
from launcher.fleet.environment import forwarded_environment
from launcher.job import ScriptJob, load_job, validate_job
from launcher.plan.facts import MachineFacts, ModelFacts
from launcher.plan.inputs import plan_inputs
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.length import resolve_length
from launcher.plan.schema import Plan, Script
from launcher.plan.script import fill_arguments, resolve_script, trainer_arguments
from launcher.presets import preset_names
from launcher.run_dir import RunDir, write_atomic
from launcher.runs.run import _write_plan
from launcher.runs.slurm_node import _directory
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed
from launcher.slurm.allocation import Allocation
from tests.unit.inputs import command, data_facts, job_of, machine_facts, model_facts, preset

TRAIN = {"max_steps": 100, "train_micro_batch_size_per_gpu": 4}
SCHEDULE = {"shape": "linear", "peak_lr": 1e-3, "warmup": 10}
CPUS = {"gpus_per_node": 0, "processes_per_node": 2}


def script_job(**sections: Any) -> ScriptJob:
    given = {"name": "mine", "script": {}, "train": TRAIN, "schedule": SCHEDULE, "cluster": CPUS, **sections}
    job = validate_job(given)
    assert isinstance(job, ScriptJob)
    return job


def script_plan(
    user: dict[str, Any] | str = "zero2",
    model: ModelFacts | None = None,
    machine: MachineFacts | None = None,
    arguments: tuple[str, ...] = ("train.py",),
    of_model: Mapping[str, Any] = MappingProxyType({}),
    **sections: Any,
) -> Plan:
    config = preset(user) if isinstance(user, str) else from_mapping(user, "ds.json")
    if model is not None:
        sections["model"] = {"name_or_path": "model", **of_model}
    job = script_job(script={"command": list(arguments)}, **sections)
    return resolve_script(plan_inputs(job, config, machine or machine_facts()), model, "/work")


def problems(**options: Any) -> str:
    with pytest.raises(RequestError) as error:
        script_plan(**options)
    return str(error.value)


def simulated_lrs(plan: Plan) -> list[float]:
    """The learning rates that DeepSpeed's engine applies in a script under the plan's JSON."""
    optimizer, scheduler = plan.ds_config["optimizer"], plan.ds_config["scheduler"]
    return simulate_deepspeed(
        scheduler["type"], scheduler["params"], optimizer["params"]["lr"], plan.length.total_updates
    )


def values_in(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for value in node.values():
            yield from values_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from values_in(value)
    else:
        yield node


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("model", [None, model_facts(parameters=100_000_000)], ids=["no model", "model"])
def test_no_auto_is_left_in_the_json_of_a_script(name: str, model: ModelFacts | None) -> None:
    cluster = {"gpus_per_node": 8}
    plan = script_plan(name, model=model, machine=machine_facts(8), cluster=cluster)
    assert "auto" not in set(map(str, values_in(plan.ds_config)))
    sizes = {"reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"}
    filled = sizes & set(plan.ds_config["zero_optimization"])
    autos = {key for key, value in preset(name).data["zero_optimization"].items() if value == "auto"} & sizes
    assert filled == (autos if model else set())
    changed = {change.key.rpartition(".")[2] for change in plan.ds_config_changes}
    assert autos <= changed


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_planned_learning_rates_are_those_that_the_engine_applies(shape: str) -> None:
    plan = script_plan(schedule={**SCHEDULE, "shape": shape})
    lr_of = planned_lrs(plan)
    assert [lr_of(update) for update in range(100)] == simulated_lrs(plan)
    start = 1e-3 / 11
    first = 0.0 if shape == "cosine" else start
    # DeepSpeed makes an extra update at the start that `launcher run` does not make: the warm-up is one update later.
    assert simulated_lrs(plan)[:2] == pytest.approx([first, start])
    assert simulated_lrs(plan)[11] == pytest.approx(1e-3, rel=1e-3)
    assert plan.learning_rate.advance == 0
    words = " ".join(reason.reason for reason in plan.learning_rate.reasons)
    assert ("Update 0 uses 0" if shape == "cosine" else "Updates 0 and 1 both use") in words


def test_a_scheduler_of_the_user_is_kept() -> None:
    scheduler = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-4, "cycle_first_step_size": 9}}
    config = {"scheduler": scheduler, "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}
    plan = script_plan(config, schedule={})
    assert plan.ds_config["scheduler"] == scheduler
    assert plan.learning_rate.schedule is None
    assert max(simulated_lrs(plan)) == plan.learning_rate.peak_lr == 1e-4


@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
def test_a_json_of_the_transformers_examples_is_filled_in(kind: str) -> None:
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    config = {
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": kind, "params": dict.fromkeys(names, "auto")},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "steps_per_print": 2000,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"),
    }
    plan = script_plan(config, schedule={"peak_lr": 1e-3, "warmup": 10})
    assert "auto" not in set(map(str, values_in(plan.ds_config)))
    scheduler = plan.ds_config["scheduler"]
    assert (scheduler["type"], scheduler["params"]["warmup_type"]) == (kind, "linear")
    assert (scheduler["params"]["total_num_steps"], scheduler["params"]["warmup_num_steps"]) == (100, 10)
    assert plan.ds_config["steps_per_print"] == 2000
    assert [planned_lrs(plan)(update) for update in range(100)] == simulated_lrs(plan)
    assert max(simulated_lrs(plan)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", [{}, {"type": "auto"}])
def test_a_scheduler_without_a_type_is_generated(kind: dict[str, str], folder: Path) -> None:
    block = {**kind, "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}}
    plan = script_plan({"scheduler": block}, schedule={"peak_lr": 1e-3, "warmup": 10})
    assert plan.ds_config["scheduler"] == script_plan(schedule={"peak_lr": 1e-3, "warmup": 10}).ds_config["scheduler"]
    (folder / "ds.json").write_text(json.dumps({"scheduler": block}))
    ended = command("exec", "--dry-run", "job.yaml", "deepspeed=ds.json", "--", "train.py")
    assert ended.status == 0, ended.err


def test_a_warning_if_a_trainer_would_find_two_learning_rates_in_the_json() -> None:
    """It compares --learning_rate with the optimizer's lr and with the scheduler's warmup_max_lr."""
    warnings = {}
    for highest in (1e-5, 2e-5):
        params = {"warmup_max_lr": highest, "warmup_num_steps": 10, "warmup_type": "linear"}
        config = {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "scheduler": {"type": "WarmupLR", "params": params},
        }
        for arguments in (("train.py", "{trainer_args}"), ("train.py",)):
            plan = script_plan(config, schedule={}, arguments=arguments)
            warnings[highest, len(arguments)] = [
                text for text in plan.warnings if "a transformers Trainer compares" in text
            ]
    (warning,) = warnings.pop((2e-5, 2))
    assert "--learning_rate 1e-05" in warning and "warmup_max_lr is 2e-05" in warning
    assert list(warnings.values()) == [[], [], []]


def test_the_error_of_a_json_with_a_wrong_type_has_its_line(folder: Path) -> None:
    (folder / "ds.json").write_text('{"scheduler": {\n"type": "WarmupLR", "params": 5}}')
    ended = command("exec", "--dry-run", "job.yaml", "deepspeed=ds.json", "schedule.shape=auto", "--", "train.py")
    assert ended.status == 2
    assert "ds.json:2: scheduler.params: found 5" in ended.err


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = script_plan(arguments=("train.py", "--deepspeed", "{ds_config}"), model=model_facts(parameters=10**8))
    again = Plan.from_json(plan.to_json())
    assert isinstance(again.workload, Script)
    assert again == plan and again.sha256 == plan.sha256
    assert script_plan(arguments=("other.py",)).sha256 != plan.sha256


def test_the_length_is_in_updates_or_samples() -> None:
    train = {"total_samples": 100, "train_micro_batch_size_per_gpu": 4, "train_batch_size": 24}
    plan = script_plan(train=train, schedule={**SCHEDULE, "warmup": 1})
    assert (plan.length.total_updates, plan.length.samples, plan.gradient_accumulation_steps) == (5, 120, 3)
    assert plan.ds_config["scheduler"]["params"]["total_num_steps"] == 5
    assert any("20 samples beyond train.total_samples" in warning for warning in plan.warnings)


def test_total_samples_is_a_length_for_training_jobs_too() -> None:
    length = resolve_length(job_of(train={"total_samples": 1000}), data_facts(300), 64)
    assert (length.total_updates, length.refilled_samples) == (16, 24)


def test_the_default_accumulation_is_one() -> None:
    plan = script_plan()
    assert (plan.train_batch_size, plan.gradient_accumulation_steps) == (8, 1)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"train": {"max_steps": 10}},
            "train.train_micro_batch_size_per_gpu: the script's own data loader decides the micro-batch",
        ),
        ({"train": {"train_micro_batch_size_per_gpu": 1}}, "train: the length of the run is not set"),
        (
            {"train": {"train_micro_batch_size_per_gpu": 1, "num_train_epochs": 2}},
            "train.num_train_epochs: the launcher does not know a script's epochs",
        ),
        (
            {"schedule": {}},
            "schedule.peak_lr: the advised learning rate depends on the model's size, but the job names no model",
        ),
        ({"schedule": {**SCHEDULE, "shape": "wsd"}}, "schedule.shape: DeepSpeed has no scheduler for wsd"),
        (
            {"schedule": {**SCHEDULE, "shape": "linear", "floor": 0}},
            "schedule.floor: a linear schedule in the DeepSpeed JSON cannot end at 0 of the peak: WarmupDecayLR has",
        ),
        ({"train": {**TRAIN, "train_batch_size": 9}}, "train_batch_size 9 is not divisible by world size 2"),
    ],
)
def test_missing_and_invalid_keys_are_errors(sections: dict[str, Any], words: str) -> None:
    assert words in problems(**sections)


def test_with_a_model_the_learning_rate_is_advised_and_limited() -> None:
    large = model_facts()
    plan = script_plan(model=large, schedule={"shape": "linear", "warmup": 10})
    assert 1e-6 < plan.learning_rate.peak_lr < 5e-5
    assert "8B" in problems(model=large)
    adapters = script_plan(model=large, schedule={}, of_model={"lora": {"r": 8}})
    assert adapters.learning_rate.peak_lr > 4 * plan.learning_rate.peak_lr


def test_without_a_model_any_peak_is_accepted() -> None:
    assert script_plan(schedule={**SCHEDULE, "peak_lr": 0.3}).learning_rate.peak_lr == 0.3


def test_warnings_about_keys_without_effect_and_an_unreached_peak() -> None:
    unused = script_plan(checkpoint={"every": 5}, export=False, data={"train": "x.jsonl"}).warnings
    assert unused == ("not used, because the script does this itself: checkpoint.every, data.train, export",)
    assert script_plan().warnings == ()
    short = script_plan(train={**TRAIN, "max_steps": 5}, schedule={**SCHEDULE, "warmup": 5})
    assert "the peak of 0.001 is not reached in 5 updates" in short.warnings[0]


def test_the_arguments_contain_the_plans_numbers() -> None:
    arguments = ("train.py", "--config={ds_config}", "{trainer_args}", "--lr", "{learning_rate}", '{"max_steps": 1}')
    plan = script_plan(arguments=arguments)
    assert isinstance(plan.workload, Script)
    script, config, *options, option, lr, braces = fill_arguments(plan, plan.workload, {"ds_config": "/run/ds.json"})
    assert (script, config, option, lr, braces) == (
        "train.py",
        "--config=/run/ds.json",
        "--lr",
        "0.001",
        '{"max_steps": 1}',
    )
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given == {f"--{name}": value for name, value in trainer_arguments(plan).items()}
    compared = {
        "learning_rate": "0.001",
        "warmup_steps": "10",
        "max_steps": "100",
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "1",
        "max_grad_norm": "1.0",
        "weight_decay": "0.0",
        "adam_beta1": "0.9",
        "adam_beta2": "0.999",
        "adam_epsilon": "1e-08",
        "use_cpu": "True",
    }
    assert trainer_arguments(plan) == compared
    assert trainer_arguments(script_plan(machine=machine_facts(2), cluster={}))["bf16"] == "True"


def test_a_script_gets_environment_variables_that_a_shared_ray_does_not_have() -> None:
    """Paths of packages and settings of trackers, including secrets; the launcher's own ranks get neither."""
    own = {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "w", "WANDB_PROJECT": "p", "PYTHONPATH": "/code"}
    own |= {"CUDA_HOME": "/cuda", "LD_LIBRARY_PATH": "/lib64", "HF_HOME": "/cache"}
    others = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "RAY_AUTH_TOKEN": "r", "AWS_SECRET_ACCESS_KEY": "a"}
    assert forwarded_environment({**own, **others}, script=True) == own
    assert forwarded_environment({**own, **others}) == {"HF_HOME": "/cache"}


JOB = """\
script: {}
train: {max_steps: 20, train_micro_batch_size_per_gpu: 2}
schedule: {shape: linear, peak_lr: 1.0e-3, warmup: 10}
cluster: {gpus_per_node: 0, processes_per_node: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a job for a script and the script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "run.sh").write_text("exec python train.py")
    (tmp_path / "start").write_text("#!/usr/bin/env bash\nexec python train.py")
    (tmp_path / "program").write_bytes(b"\x7fELF\x02\x01\x01\0\0")
    return tmp_path


def test_a_dry_run_shows_the_plan_and_the_command(folder: Path) -> None:
    ended = command(
        *("exec", "--dry-run", "job.yaml", "train.max_steps=30", "--"),
        *(
            "train.py",
            "--deepspeed",
            "{ds_config}",
            "--lr",
            "{learning_rate}",
            "a=b",
            "--dry-run",
            "--",
            "two words",
            "$x",
        ),
    )
    assert (ended.status, ended.err) == (0, "")
    assert "python train.py --deepspeed RUN/ds_config.json --lr 0.001 a=b --dry-run -- 'two words' '$x'\n" in ended.out
    assert "30 in total, 120 samples" in ended.out
    assert sorted(path.name for path in folder.iterdir()) == ["job.yaml", "program", "run.sh", "start", "train.py"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["job.yaml"], "no script is named"),
        (["job.yaml", "--"], "a script is missing after --"),
        (["job.yaml", "--", "-m"], "a script is missing after --"),
        (["job.yaml", "train.py"], "-- and a script are missing"),
        (["job.yaml", "--dry-run", "--", "train.py"], "--dry-run: options go before the job file"),
        (["job.yaml", "--", "--lr", "1"], "the command must start with a Python script or -m MODULE, found --lr"),
        (["job.yaml", "--", "tran.py"], "the script tran.py does not exist"),
        (["job.yaml", "--", "python", "train.py"], "leave it out: launcher exec"),
        (["job.yaml", "--", "/usr/bin/python3.11", "train.py"], "leave it out: launcher exec"),
        (
            ["job.yaml", "--", "torchrun", "--nproc_per_node", "2", "train.py"],
            "torchrun before the script is not needed",
        ),
        (["job.yaml", "--", "deepspeed", "train.py"], "deepspeed before the script is not needed"),
        (["job.yaml", "--", "./run.sh"], "./run.sh is a shell script, but every rank runs a Python script"),
        (["job.yaml", "--", "start"], "start is for another interpreter (/usr/bin/env bash)"),
        (["job.yaml", "--", "program"], "program is a binary file"),
        (["job.yaml", "train.max_stps=3", "--", "train.py"], "did you mean max_steps?"),
        (
            ["job.yaml", "schedule.peak_lr=auto", "--", "train.py"],
            "command line: schedule.peak_lr: the advised learning rate",
        ),
        (["job.yaml", "deepspeed=auto", "--", "train.py"], "deepspeed: auto chooses a preset by the memory of model"),
        (
            ["job.yaml", "cluster.nodes=2", "--", "train.py"],
            "the job asks for 2 nodes, and only this machine is available",
        ),
        (
            ["job.yaml", "cluster.spare_nodes=1", "--", "train.py"],
            "cluster.spare_nodes: the job asks for 2 nodes, spare nodes included, and only this machine is available",
        ),
        (["job.yaml", "model.name_or_path=gone/away/here", "--", "train.py"], "gone/away/here"),
    ],
    ids=str,
)
def test_invalid_input_starts_nothing(folder: Path, arguments: list[str], words: str) -> None:
    ended = command("exec", *arguments)
    assert ended.status == 2
    assert words in ended.err
    assert not (folder / "runs").exists()


def test_model_and_data_are_required_without_a_script(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB.replace("script: {}\n", ""))
    for verb in ("run", "plan", "lr"):
        ended = command(verb, "job.yaml")
        assert ended.status == 2
        assert "model: this key is required" in ended.err and "data: this key is required" in ended.err
        assert "To run your own script, add a section `script` instead" in ended.err


def test_plan_and_lr_show_the_numbers_of_a_job_for_a_script(folder: Path) -> None:
    assert isinstance(load_job(folder / "job.yaml").job, ScriptJob)
    ended = command("plan", "job.yaml")
    assert ended.status == 0, ended.err
    assert "to be given: launcher exec JOB.YAML -- SCRIPT" in ended.out
    assert "20 in total, 80 samples" in ended.out
    shown = json.loads(command("lr", "job.yaml", "--json").out)
    plan = Plan.from_json(command("plan", "job.yaml", "--json").out)
    assert isinstance(plan.workload, Script)
    (curve,) = shown["curves"]
    assert curve["rates"] == simulated_lrs(plan)
    assert curve["rates"][0] == curve["rates"][1] == 1e-3 / 11


@pytest.mark.parametrize("planned", [True, False])
def test_a_requeued_script_keeps_its_directory_and_its_checkpoints(tmp_path: Path, planned: bool) -> None:
    job = script_job(output_dir=str(tmp_path))
    first = Allocation(job_id="7", restart=0, node=0, hosts=("h1",), cpus=2, gpus=0)
    begun, again = _directory(job, first)
    assert not again
    (begun.checkpoints / "of-the-script").write_text("weights")
    if planned:
        _write_plan(script_plan(), begun)
    requeued, again = _directory(job, replace(first, restart=1))
    assert (requeued.path, again) == (begun.path, planned)
    # Without a plan nothing was started in the directory.
    assert (requeued.checkpoints / "of-the-script").exists() == planned


def test_a_run_of_a_script_cannot_be_resumed(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "mine")
    write_atomic(run.plan_file, script_plan(arguments=("train.py", "--epochs", "2")).to_json())
    ended = command("resume", str(run.path))
    assert ended.status == 2
    assert "this is a run of the script train.py --epochs, which manages its own checkpoints" in ended.err
    assert "launcher exec" in ended.err

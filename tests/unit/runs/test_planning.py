"""The user's DeepSpeed JSON in `launcher plan` and `launcher run`: linted, compared with the job, and completed.

Errors are reported before model or data are read: the folder here has neither weights nor a tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.ds_config import from_mapping
from launcher.errors import RequestError
from launcher.job import validate_job
from launcher.plan.inputs import plan_inputs
from launcher.plan.script import resolve_script
from launcher.runs.planning import lint_ds_config
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


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "zero_optimisation": {"stage": 2}\n}', "ds.json:2: zero_optimisation: DeepSpeed has no such key here"),
        ('{\n  "fp16": {"enabled": true},\n  "bf16": {"enabled": true}\n}', "fp16.enabled: fp16 and bf16 are both on"),
        ('{"zero_optimization": {"stage": 2,\n "reduce_bucket_size": "many"}}', "ds.json:2: zero_optimization.reduce"),
        ('{"amp": {"enabled": true}}', "ds.json:1: amp: DeepSpeed rejects this key"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "NVMe offload without nvme_path"),
    ],
)
def test_an_error_of_lint_ends_the_command(text: str, words: str, verb: str, folder: Path) -> None:
    ended = launch(text, verb=verb)
    assert ended.status == 2
    assert words in ended.err
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("folder")
def test_a_warning_of_lint_is_shown_with_line_and_hint() -> None:
    remember(Path("job.yaml"), (), model_facts(), data_facts())
    ended = launch('{"zero_optimization": {"stage": 2,\n  "stage3_max_live_parameters": 1e9}}')
    assert ended.status == 0, ended.err
    assert "note: ds.json:2: zero_optimization.stage3_max_live_parameters: has no effect under stage 2" in ended.out
    assert "Set stage to 3, or remove it." in ended.out


@pytest.mark.usefixtures("folder")
def test_errors_in_an_inline_json_have_the_lines_of_the_job_file() -> None:
    with Path("job.yaml").open("a") as job:
        job.write("deepspeed:\n  zero_optimization:\n    stage: 2\n    overlap_com: true\n")
    ended = command("plan", "job.yaml")
    assert ended.status == 2
    assert "job.yaml:7: deepspeed.zero_optimization.overlap_com: DeepSpeed has no such key here" in ended.err


@pytest.mark.usefixtures("folder")
def test_yaml_numbers_with_exponents_are_numbers() -> None:
    """YAML 1.1 reads 5e7 and 2e-5 as text."""
    remember(Path("job.yaml"), (), model_facts(), data_facts())
    with Path("job.yaml").open("a") as job:
        job.write("deepspeed:\n  zero_optimization: {stage: 2, reduce_bucket_size: 5e7}\n")
        job.write("  optimizer: {type: AdamW, params: {lr: 2e-6}}\n")
    ended = command("plan", "--json", "job.yaml")
    assert ended.status == 0, ended.err
    config = json.loads(ended.out)["plan"]["ds_config"]
    assert config["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert config["optimizer"]["params"]["lr"] == 2e-6


SCHEDULER = '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}, "scheduler": {"type": "WarmupDecayLR", "params": '
SCHEDULER += '{"warmup_max_lr": 1e-5, "warmup_type": "linear",\n"warmup_num_steps": 5, "total_num_steps": 500}}}'
CONFLICTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "batch": ('{\n"train_batch_size": 64}', "train.train_batch_size=32", ("ds.json:2: train_batch_size", "64", "32")),
    "precision": ('{"bf16": {\n"enabled": true}}', "model.dtype=float32", ("ds.json:1: bf16", "bf16", "fp32")),
    "learning rate": (
        '{"optimizer": {"type": "AdamW", "params": {\n"lr": 3e-6}}}',
        "schedule.peak_lr=1e-6",
        ("ds.json:2: optimizer.params.lr: 3e-06 here", "schedule.peak_lr in the job is 1e-06"),
    ),
    "clipping": (
        '{\n"gradient_clipping": 0.5}',
        "train.gradient_clipping=2.0",
        ("ds.json:2: gradient_clipping: 0.5 here", "train.gradient_clipping in the job is 2.0"),
    ),
    "total steps": (
        SCHEDULER,
        "train.max_steps=100",
        ("train.max_steps: 100 in the job", "total_num_steps is 500 in ds.json"),
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts_are_reported_before_anything_is_measured(name: str, folder: Path) -> None:
    text, override, expected = CONFLICTS[name]
    ended = launch(text, override)
    assert ended.status == 2
    assert all(words in ended.err for words in expected), ended.err
    assert not (folder / "runs").exists(), "the model was read"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", CONFLICTS)
def test_equal_values_do_not_conflict(name: str) -> None:
    text, override, _ = CONFLICTS[name]
    key = override.partition("=")[0]
    same = {"train.train_batch_size": "64", "model.dtype": "bfloat16", "schedule.peak_lr": "3e-6"}
    same |= {"train.gradient_clipping": "0.5", "train.max_steps": "500"}
    remember(Path("job.yaml"), (f"{key}={same[key]}",), model_facts(), data_facts())
    ended = launch(text, f"{key}={same[key]}")
    assert ended.status == 0, ended.err


@pytest.mark.usefixtures("folder")
def test_numbers_in_quotes_are_accepted_if_deepspeed_converts_them() -> None:
    remember(Path("job.yaml"), (), model_facts(), data_facts())
    ended = launch('{"gradient_clipping": "0.7", "train_batch_size": "64" # kept\n}')
    assert ended.status == 0, ended.err
    assert "a number written as text" in ended.out


@pytest.mark.usefixtures("folder")
def test_the_changes_are_listed_key_by_key_with_reasons() -> None:
    remember(Path("job.yaml"), (), model_facts(), data_facts())
    ended = launch('{"gradient_clipping": "auto", "steps_per_print": 10, "zero_optimization": {"stage": 1}}')
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in ended.out.splitlines() if "→" in line}
    assert rows["gradient_clipping"] == "auto → 1 the largest global gradient norm"
    assert rows["optimizer.type"].startswith("not set → AdamW the plan's optimizer")
    assert rows["scheduler.params.warmup_type"].startswith("not set → linear the generated schedule")
    assert rows["optimizer.params.torch_adam"].startswith("not set → true on CPUs the launcher uses PyTorch's Adam")
    assert not {"steps_per_print", "zero_optimization.stage"} & set(rows)


@pytest.mark.usefixtures("folder")
def test_values_that_the_plan_fills_in_cause_no_warning() -> None:
    remember(Path("job.yaml"), (), model_facts(), data_facts())
    ended = launch('{"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}')
    assert ended.status == 0, ended.err
    assert "no lr" not in ended.out
    assert "optimizer.params.lr" in ended.out


DIVIDED = {
    "tensor_parallel.autotp_size": {"tensor_parallel": {"autotp_size": 4}},
    "tensor_parallel.tp.tp_size": {"tensor_parallel": {"tp": {"tp_size": "2"}}},
    "pipeline": {"pipeline": {"stages": 2}},
    "expert_parallel": {"expert_parallel": {"enabled": True, "autoep_size": 2}},
}


@pytest.mark.parametrize("key", DIVIDED)
def test_other_kinds_of_model_parallelism_are_only_for_scripts(key: str) -> None:
    with pytest.raises(RequestError, match=f"ds.json: {key}: .*") as caught:
        lint_ds_config(plan_inputs(job_of(), from_mapping(DIVIDED[key], "ds.json"), machine_facts(8)))
    assert "launcher exec" in str(caught.value)
    train = {"max_steps": 10, "train_micro_batch_size_per_gpu": 1}
    schedule = {"shape": "linear", "peak_lr": 1e-5, "warmup": 2}
    job = validate_job({"script": {"command": "train.py"}, "train": train, "schedule": schedule})
    inputs = plan_inputs(job, from_mapping(DIVIDED[key], "ds.json"), machine_facts(8))
    lint_ds_config(inputs)
    config = resolve_script(inputs, None, "/work").ds_config
    assert config[key.partition(".")[0]] == DIVIDED[key][key.partition(".")[0]]


def test_disabled_model_parallelism_is_accepted() -> None:
    user = {"tensor_parallel": {"autotp_size": 1}, "expert_parallel": {"enabled": False}, "pipeline": {}}
    assert plan_of(user=user).ds_config["tensor_parallel"] == {"autotp_size": 1}

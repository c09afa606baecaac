"""Which parameters are trained: patterns, refused options, learning rates, and the output of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.job.schema import ModelSection
from launcher.plan.inputs import plan_inputs
from launcher.plan.resolve import check_inputs
from launcher.plan.schema import Plan
from launcher.runs.rest import _is_fixed
from launcher.trainable import frozen_names
from tests.unit.inputs import command, data_facts, job_of, machine_facts, model_facts, plan_of, preset, remember
from tests.unit.inputs import write_folder as write_project

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]


def problem(error: pytest.ExceptionInfo[RequestError]) -> tuple[str | None, str]:
    (found,) = error.value.problems
    return found.key, str(found)


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["model.embed_tokens"], {"model.embed_tokens.weight"}),
        (["model.embed_tokens.weight"], {"model.embed_tokens.weight"}),
        (["model.layers.1"], {name for name in NAMES if ".1." in name}),
        (["model.layers.[01]"], {name for name in NAMES if ".0." in name or ".1." in name}),
        (["*.norm"], {name for name in NAMES if name.endswith("norm.weight")}),
        (["*.q_proj", "lm_head"], {name for name in NAMES if "q_proj" in name or "head" in name}),
    ],
)
def test_a_pattern_matches_parameters_or_modules(patterns: list[str], frozen: set[str]) -> None:
    assert frozen_names(NAMES, patterns) == frozen


@given(st.sets(st.sampled_from(NAMES), min_size=1, max_size=len(NAMES) - 1))
def test_a_full_name_freezes_only_its_parameter(chosen: set[str]) -> None:
    assert frozen_names(NAMES, sorted(chosen)) == chosen


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["model.embed_token"], "did you mean model.embed_tokens?"),
        (["model.layers.2"], "did you mean model.layers"),
        (["zzz*"], "names in this model: lm_head, model"),
        (["*"], "nothing is left to train"),
        (["model", "lm_head"], "nothing is left to train"),
    ],
)
def test_invalid_patterns_are_refused(patterns: list[str], words: str) -> None:
    with pytest.raises(RequestError) as error:
        frozen_names(NAMES, patterns)
    key, text = problem(error)
    assert key == "model.freeze" and words in text


HERE = {"deepspeed": "0.19.8", "peft": "0.21.2", "liger-kernel": "0.6.0", "triton": "3.4.0", "flash-attn": "2.8.3"}


@pytest.mark.parametrize(
    ("model", "gpus", "lacks", "words"),
    [
        ({"lora": {}}, 0, ("peft",), "pip install peft"),
        ({"liger": True}, 0, (), "need GPUs, but this run is on CPUs"),
        ({"liger": True}, 8, ("liger-kernel",), "pip install liger-kernel"),
        ({"torch_compile": True}, 0, ("compiler",), "install g++"),
        ({"torch_compile": True}, 8, ("triton",), "install the triton"),
        ({"attn_implementation": "flash_attention_2"}, 0, (), "needs GPUs, but this run is on CPUs"),
        ({"attn_implementation": "flash_attention_2"}, 8, ("flash-attn",), "pip install flash-attn, or remove it"),
    ],
)
def test_options_that_the_machine_does_not_support_are_refused_before_measuring(model, gpus, lacks, words) -> None:
    job = job_of(model=model)
    (key,) = (f"model.{name}" for name in model)

    def machine(missing: tuple[str, ...]):
        versions = {name: "missing" if name in missing else version for name, version in HERE.items()}
        return machine_facts(gpus, versions=versions, compiler=None if "compiler" in missing else "/usr/bin/g++")

    with pytest.raises(RequestError) as error:
        check_inputs(plan_inputs(job, preset("zero2"), machine(lacks)))
    found, text = problem(error)
    assert found == key and words in text
    if lacks:
        check_inputs(plan_inputs(job, preset("zero2"), machine(())))


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ({"lora": {}, "freeze": ["lm_head"]}, "model", "remove freeze or lora"),
        ({"lora": {"r": 0}}, "model.lora.r", "greater than 0"),
        ({"lora": {"dropout": 1}}, "model.lora.dropout", "less than 1"),
        ({"lora": {"rank": 8}}, "model.lora.rank", "valid keys: r, alpha, dropout, target_modules, merge"),
        ({"freeze": "lm_head"}, "model.freeze", "must be a list"),
    ],
)
def test_invalid_sections_are_refused(model: dict, key: str, words: str) -> None:
    with pytest.raises(RequestError) as error:
        job_of(model=model)
    found, text = problem(error)
    assert found == key and words in text


def test_a_plan_warns_of_torch_compile_under_zero_3() -> None:
    warnings = {}
    for stage in (2, 3):
        job = job_of(model={"torch_compile": True}, deepspeed=f"zero{stage}")
        plan = plan_of(
            job,
            machine=machine_facts(8, versions=HERE, compiler="/usr/bin/g++"),
            user=dict(preset(f"zero{stage}").data),
        )
        warnings[stage] = [warning for warning in plan.warnings if "torch_compile under ZeRO-3" in warning]
    assert warnings[2] == [] and len(warnings[3]) == 1


LORA_FACTS = {"trainable_parameters": 20_000_000, "adapted_modules": ("q_proj", "v_proj")}


def lora_plan(**sections: object) -> Plan:
    facts = model_facts(**LORA_FACTS)
    return plan_of(job_of(model={"lora": {"r": 8}}, **sections), model=facts, machine=machine_facts(8, versions=HERE))


def test_the_advised_learning_rate_of_adapters_is_higher() -> None:
    full, lora = plan_of(), lora_plan()
    assert lora.learning_rate.reasons[0].value == "lora"
    assert lora.learning_rate.peak_lr == 3e-4
    assert lora.learning_rate.peak_lr > 5 * full.learning_rate.peak_lr
    # A learning rate that is unsafe for full fine-tuning is usual for adapters.
    assert lora_plan(schedule={"peak_lr": 3e-4}).learning_rate.peak_lr == 3e-4
    with pytest.raises(RequestError, match="peak_lr"):
        plan_of(job_of(schedule={"peak_lr": 3e-4}))


def test_options_that_do_not_affect_weights_may_change_on_resume() -> None:
    free = ["gradient_checkpointing", "attn_implementation", "torch_compile", "liger", "chunked_loss"]
    assert not any(_is_fixed(f"model.{name}") for name in free)
    others = [name for name in ModelSection.model_fields if name not in free]
    assert all(_is_fixed(f"model.{name}") for name in others) and _is_fixed("model.lora.r")
    # A whole section may contain any key, so it is settled.
    assert _is_fixed("model") and _is_fixed("data") and _is_fixed("data.train") and _is_fixed("train.seed")
    assert not _is_fixed("train.max_steps") and not _is_fixed("train.seeds")


CPU_JOB = """\
model: {{name_or_path: model, {method}}}
data: {{train: data/train.jsonl}}
cluster: {{gpus_per_node: 0, processes_per_node: 2}}
"""


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("lora: {r: 8}", LORA_FACTS, ["20,000,000 parameters (0.25%) in adapters of rank 8 (alpha 16) on q_proj"]),
        ("freeze: [lm_head]", {"trainable_parameters": 6_000_000_000}, ["(75.00%); frozen: lm_head"]),
        ("gradient_checkpointing: true", {}, ["all parameters; gradient checkpointing"]),
    ],
    ids=["lora", "freeze", "switch"],
)
def test_plan_and_lr_print_what_is_trained(method, changes, words, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, CPU_JOB.format(method=method))
    remember(tmp_path / "job.yaml", (), model_facts(**changes), data_facts())
    shown = command("plan", "job.yaml")
    assert shown.status == 0, shown.err
    text = " ".join(shown.out.split())
    assert all(word in text for word in words)
    report = command("lr", "job.yaml")
    assert report.status == 0, report.err
    assert ("the best learning rates of 18 models" in " ".join(report.out.split())) == ("lora" in method)


SHARING = {"key_value_heads": 8, "whole_attention": True}


def shared_plan(size: int, user: dict | None = None, facts: dict | None = None, **sections: object) -> Plan:
    job = job_of(**{"model": {"sequence_parallel_size": size}, **sections})
    return plan_of(job, user, model_facts(**(SHARING if facts is None else facts)), machine=machine_facts(8))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_that_share_sequences_count_as_one_in_the_batch_size(size: int) -> None:
    plan = shared_plan(size, train={"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2})
    assert (plan.world.size, plan.world.data_parallel_size) == (8, 8 // size)
    assert plan.gradient_accumulation_steps == 64 // 2 // (8 // size)
    # DeepSpeed checks the batch against the groups only if the JSON has their size.
    assert plan.ds_config.get("sequence_parallel_size", 1) == size


def test_sharing_sequences_reduces_activation_memory() -> None:
    train = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}
    alone, shared = (shared_plan(size, train=train).training.memory for size in (1, 4))
    assert shared["activations"] < 0.4 * alone["activations"]
    assert shared["parameters"] == alone["parameters"]


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (3, {}, "8 ranks cannot be divided into groups of 3"),
        (4, {"facts": {**SHARING, "whole_attention": False}}, "layers that all attend to all previous tokens"),
        (4, {"facts": {"whole_attention": True}}, "layers that all attend to all previous tokens"),
        (8, {"facts": {**SHARING, "attention_heads": 12}}, "8 ranks cannot share 12 attention heads"),
        (8, {"facts": {**SHARING, "attention_heads": 24, "key_value_heads": 6}}, "24 attention heads and 6"),
        (2, {"user": {"zero_optimization": {"stage": 3, "reduce_scatter": False}}}, "reduce_scatter: false"),
        (2, {"user": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}}, "gradients: true"),
    ],
)
def test_unsupported_sequence_sharing_is_refused(size: int, changes: dict, words: str) -> None:
    with pytest.raises(RequestError) as error:
        shared_plan(size, **changes)
    key, text = problem(error)
    assert key == "model.sequence_parallel_size" and words in text


@pytest.mark.parametrize("other", [{"torch_compile": True}, {"liger": True}, {"attn_implementation": "eager"}])
def test_options_not_verified_with_sequence_parallelism_are_refused(other: dict) -> None:
    job = job_of(model={"sequence_parallel_size": 2, **other})
    machine = machine_facts(8, versions=HERE, compiler="/usr/bin/g++")
    with pytest.raises(RequestError) as error:
        check_inputs(plan_inputs(job, preset("zero2"), machine))
    key, _ = problem(error)
    assert key == "model.sequence_parallel_size"


def test_a_json_with_another_sequence_parallel_size_is_refused() -> None:
    with pytest.raises(RequestError, match=r"2 here, but model.sequence_parallel_size in the job is 1"):
        shared_plan(1, user={"sequence_parallel_size": 2, "zero_optimization": {"stage": 2}})

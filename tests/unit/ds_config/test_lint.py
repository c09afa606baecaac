"""lint on a table of bad JSONs; --fix; and that lint finds nothing to fix in the presets."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli.lint import lint as lint_command
from launcher.ds_config import catalogue, from_mapping
from launcher.ds_config.catalogue import Catalogue, load_catalogue
from launcher.ds_config.lint import Finding, apply_fixes, lint
from launcher.ds_config.read import parse_ds_config, read_ds_config
from launcher.ds_config.target import Device, Target

PRESETS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
ADAM = '"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}'


@pytest.fixture(scope="session")
def keys() -> Catalogue:
    """The catalogue of the installed DeepSpeed: shipped, cached or from a separate process."""
    return load_catalogue()


def findings(text: str, keys: Catalogue, world_size: int | None = None, device: Device = "cuda") -> list[Finding]:
    return lint(parse_ds_config(text, "ds.json"), Target(device, world_size), keys)


def scheduler(kind: str, **params: object) -> str:
    return f'{{{ADAM}, "scheduler": {json.dumps({"type": kind, "params": params})}}}'


def optimizer(kind: str, extra: str = "", **params: object) -> str:
    return f'{{"optimizer": {json.dumps({"type": kind, "params": {"lr": 1e-5, **params}})}{extra}}}'


def zero(**keys: object) -> str:
    return json.dumps({"zero_optimization": keys})


# text, severity, key path, a part of message or hint
BAD = [
    ('{"train_bacth_size": 8}', "error", "train_bacth_size", "train_batch_size"),
    ('{"gradient_cliping": 1.0}', "error", "gradient_cliping", "gradient_clipping"),
    ('{"something_else_altogether": 1}', "warning", "something_else_altogether", "silently ignores it"),
    ('{"learning_rate": 1e-5}', "error", "learning_rate", "optimizer.params.lr"),
    (
        '{"offload_optimizer": {"device": "cpu"}}',
        "error",
        "offload_optimizer",
        "zero_optimization.offload_optimizer",
    ),
    ('{"zero_optimisation": {"stage": 2}}', "error", "zero_optimisation", "zero_optimization"),
    (zero(stage=2, overlap_com=True), "error", "zero_optimization.overlap_com", "overlap_comm"),
    (
        zero(stage=3, offload_param={"device": "cpu", "pin_memry": True}),
        "error",
        "zero_optimization.offload_param.pin_memry",
        "pin_memory",
    ),
    ('{"checkpoint": {"load_univresal": true}}', "error", "checkpoint.load_univresal", "load_universal"),
    (
        '{"fp16": {"enabled": true, "loss_scale_windows": 5}}',
        "error",
        "fp16.loss_scale_windows",
        "loss_scale_window",
    ),
    ('{"amp": {"enabled": true}}', "error", "amp", "removed"),
    ('{"sparse_attention": {}}', "error", "sparse_attention", "removed"),
    ('{"elasticity": {"enabled": true}}', "error", "elasticity", "removed"),
    ('{"curriculum_learning": {}}', "error", "curriculum_learning", "data_efficiency"),
    (zero(stage=3, mics_shard_size=4), "error", "zero_optimization.mics_shard_size", "MiCS"),
    (zero(stage=5), "error", "zero_optimization.stage", "not an allowed value"),
    (
        zero(stage=2, reduce_bucket_size="many"),
        "error",
        "zero_optimization.reduce_bucket_size",
        "a whole number",
    ),
    (zero(stage=2, reduce_bucket_size="1e6"), "error", "zero_optimization.reduce_bucket_size", "in quotes"),
    (
        zero(stage=2, reduce_bucket_size=1.5),
        "error",
        "zero_optimization.reduce_bucket_size",
        "a whole number",
    ),
    (zero(stage=2, reduce_bucket_size=0), "error", "zero_optimization.reduce_bucket_size", "above 0"),
    (zero(stage=2, overlap_comm=[True]), "error", "zero_optimization.overlap_comm", "true or false"),
    (
        zero(stage=3, offload_param={"device": "CPU"}),
        "error",
        "zero_optimization.offload_param.device",
        "cpu",
    ),
    (zero(stage=2, offload_optimizer="cpu"), "error", "zero_optimization.offload_optimizer", "a block"),
    ('{"fp16": {\n"enabled": True,\n"loss_scale": 0}}', "error", "fp16.enabled", "Write true"),
    ('{"gradient_clipping": "1.0"}', "error", "gradient_clipping", "in quotes"),
    ('{"gradient_clipping": null}', "error", "gradient_clipping", "null"),
    ('{"gradient_clipping": -1}', "error", "gradient_clipping", "below 0"),
    ('{"gradient_clipping": 0}', "warning", "gradient_clipping", "not clipped"),
    ('{"train_micro_batch_size_per_gpu": "2"}', "error", "train_micro_batch_size_per_gpu", "in quotes"),
    ('{"train_batch_size": 2.5}', "error", "train_batch_size", "whole number"),
    ('{"gradient_clipping": true}', "error", "gradient_clipping", "as the number 1"),
    ('{"scheduler": {"type": null, "params": {}}}', "error", "scheduler.type", "ignores it without a type"),
    ('{"gradient_clipping": "1.0"}', "error", "gradient_clipping", "the launcher's plan converts it"),
    ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "error", "fp16.enabled", "both on"),
    (
        '{"torch_autocast": {"enabled": true}, "bf16": {"enabled": true}}',
        "warning",
        "torch_autocast.enabled",
        "Keep one",
    ),
    (
        '{"bf16": {"enabled": true, "bf16_optimizer_states": true}}',
        "error",
        "bf16.bf16_optimizer_states",
        "bf16_master_weights_and_grads",
    ),
    ('{"fp16": {"enabled": 1}, "bf16": {"enabled": "yes"}}', "error", "fp16.enabled", "both on"),
    ('{"fp16": {"enabled": true, "loss_scale": -1}}', "error", "fp16.loss_scale", "Write 0"),
    ('{"zero_optimization": 1}', "error", "zero_optimization", "a block"),
    (zero(stage=2, reduce_bucket_size=1e30), "error", "zero_optimization.reduce_bucket_size", "a whole number"),
    ('{"fp16": {"enabled": "perhaps"}}', "error", "fp16.enabled", "true or false"),
    ('{"fp16": {"enabled": "None"}}', "error", "fp16.enabled", "true or false"),
    ('{"float16": {"enabled": true}}', "error", "float16", "Use fp16"),
    ('{"zero": {"stage": 2}}', "error", "zero", "Use zero_optimization"),
    ('{"clip_grad": 1.0}', "error", "clip_grad", "gradient_clipping"),
    ('{"steps_per_print": "10"}', "error", "steps_per_print", "in quotes"),
    ('{"steps_per_print": "inf"}', "error", "steps_per_print", "a number or null"),
    ('{"steps_per_print": 0}', "error", "steps_per_print", "divides by it"),
    ('{"steps_per_print": -1}', "warning", "steps_per_print", "does not switch printing off"),
    ('{"steps_per_print": -Infinity}', "error", "steps_per_print", "which is not valid JSON"),
    (
        '{"activation_checkpointing": {"number_checkpoints": "4"}}',
        "error",
        "activation_checkpointing.number_checkpoints",
        "in quotes",
    ),
    ('{"gradient_clipping": "nan"}', "error", "gradient_clipping", "a number"),
    (
        zero(stage=3, prefetch_bucket_size=1, stage3_prefetch_bucket_size=1),
        "error",
        "zero_optimization.prefetch_bucket_size",
        "stage3_prefetch_bucket_size, which is set too",
    ),
    (zero(stage=2, max_live_parameters=1), "warning", "zero_optimization.max_live_parameters", "stage 2"),
    (
        zero(stage=3, gather_16bit_weights_on_model_save="false"),
        "note",
        "zero_optimization.gather_16bit_weights_on_model_save",
        "Trainer",
    ),
    (
        zero(stage=3, stage3_gather_fp16_weights_on_model_save=True),
        "warning",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "Use stage3_gather_16bit_weights_on_model_save",
    ),
    (zero(stage=2, cpu_offload=False), "warning", "zero_optimization.cpu_offload", "Remove it"),
    (
        zero(stage=2, offload_optimizer={"device": "gpu"}),
        "error",
        "zero_optimization.offload_optimizer.device",
        'Write "none"',
    ),
    (
        zero(stage=2, stage3_max_live_parameters=1),
        "warning",
        "zero_optimization.stage3_max_live_parameters",
        "stage 2",
    ),
    (zero(stage=2, offload_param={"device": "cpu"}), "warning", "zero_optimization.offload_param", "stage 2"),
    (
        zero(stage=1, zero_quantized_gradients=True),
        "warning",
        "zero_optimization.zero_quantized_gradients",
        "stage 1",
    ),
    (zero(overlap_comm=True), "warning", "zero_optimization", "no stage"),
    ('{"zero_optimization": true}', "warning", "zero_optimization", '{"stage": 1}'),
    (zero(stage=2, cpu_offload=True), "warning", "zero_optimization.cpu_offload", "offload_optimizer"),
    (
        zero(stage=2, cpu_offload=True, offload_optimizer={"device": "cpu"}),
        "error",
        "zero_optimization.cpu_offload",
        "is set too",
    ),
    (
        zero(stage=0, offload_optimizer={"device": "cpu"}),
        "error",
        "zero_optimization.offload_optimizer",
        "fails under stage 0",
    ),
    (
        zero(stage=3, offload_param={"device": "nvme"}),
        "error",
        "zero_optimization.offload_param",
        "nvme_path",
    ),
    (
        zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/n"}),
        "error",
        "zero_optimization.offload_optimizer.device",
        "stage 2",
    ),
    (
        zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        "error",
        "zero_optimization.offload_optimizer.ratio",
        "partial",
    ),
    (
        zero(stage=2, offload_optimizer={"device": "cpu"}),
        "note",
        "zero_optimization.offload_optimizer",
        "DeepSpeedCPUAdam",
    ),
    (
        zero(stage=3, stage3_gather_16bit_weights_on_model_save=False),
        "note",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "Trainer",
    ),
    (zero(stage=3, compute_grad_norm=False), "error", "zero_optimization.compute_grad_norm", "stage 3"),
    (
        '{"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}',
        "error",
        "gradient_allreduce_op",
        "mean",
    ),
    ('{"communication_data_type": "float32"}', "error", "communication_data_type", "fp32"),
    ('{"checkpoint": {"tag_validation": "No"}}', "error", "checkpoint.tag_validation", "Ignore"),
    (optimizer("AdamX"), "error", "optimizer.type", "Did you mean"),
    (optimizer("sgd"), "error", "optimizer.type", "SGD"),
    (
        optimizer("SGD", ', "zero_optimization": {"stage": 1}'),
        "error",
        "optimizer.type",
        "zero_allow_untested_optimizer",
    ),
    (optimizer("FusedAdam"), "error", "optimizer.type", 'Write "AdamW"'),
    (optimizer("DeepSpeedCPUAdam"), "error", "optimizer.type", 'Write "AdamW"'),
    (optimizer("AdamW", betas=[0.9]), "error", "optimizer.params.betas", "two numbers"),
    (optimizer("AdamW", betas=[0.9, 1.0]), "error", "optimizer.params.betas", "two numbers"),
    (optimizer("AdamW", weight_decay=-1), "error", "optimizer.params.weight_decay", "at least 0"),
    (optimizer("AdamW", lr=[1e-5]), "error", "optimizer.params.lr", "Write a number"),
    (optimizer("AdamW", weight_decy=0.1), "error", "optimizer.params.weight_decy", "weight_decay"),
    (optimizer("AdamW", max_grad_norm=1.0), "error", "optimizer.params.max_grad_norm", "gradient_clipping"),
    (optimizer("AdamW", eps="1e-8"), "error", "optimizer.params.eps", "in quotes"),
    ('{"optimizer": {"type": "AdamW", "params": {}}}', "warning", "optimizer", "1e-3"),
    (
        optimizer("Lamb", ', "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}'),
        "error",
        "optimizer.type",
        "no CPU version",
    ),
    (scheduler("WarmupDecay", warmup_type="linear"), "error", "scheduler.type", "WarmupDecayLR"),
    (scheduler("warmuplr", warmup_type="linear"), "error", "scheduler.type", "WarmupLR"),
    (
        scheduler("WarmupLR", warmup_steps=3, warmup_type="linear"),
        "error",
        "scheduler.params.warmup_steps",
        "warmup_num_steps",
    ),
    (
        scheduler("WarmupDecayLR", warmup_num_steps=5, warmup_type="linear"),
        "error",
        "scheduler.params",
        "total_num_steps",
    ),
    (
        scheduler("WarmupLR", warmup_num_steps=0, warmup_type="linear"),
        "error",
        "scheduler.params.warmup_num_steps",
        "above 0",
    ),
    (
        scheduler("WarmupCosineLR", warmup_num_steps=100, total_num_steps=50, warmup_type="linear"),
        "error",
        "scheduler.params.warmup_num_steps",
        "not shorter",
    ),
    (
        scheduler("WarmupCosineLR", total_num_steps=500, warmup_type="linear"),
        "error",
        "scheduler.params",
        "1000 updates (the default)",
    ),
    (
        scheduler("WarmupCosineLR", total_num_steps=9, warmup_max_lr=1),
        "error",
        "scheduler.params.warmup_max_lr",
        "peaks at optimizer.params.lr",
    ),
    (
        scheduler("WarmupCosineLR", total_num_steps=9, warmup_max_ratio=1),
        "error",
        "scheduler.params.warmup_max_ratio",
        "peaks at optimizer.params.lr",
    ),
    (
        scheduler("WarmupDecayLR", total_num_steps=9, warmup_ratio=0.1),
        "error",
        "scheduler.params.warmup_ratio",
        "Write warmup_num_steps, in updates",
    ),
    (scheduler("WarmupLR", warmup_num_steps=5), "warning", "scheduler.params", "log"),
    (scheduler("WarmupLR", warmup_num_steps="auto"), "note", "scheduler.params", "fills in linear"),
    (
        scheduler("WarmupLR", warmup_num_steps=5, warmup_type="log"),
        "note",
        "scheduler.params.warmup_type",
        "35%",
    ),
    (
        scheduler("WarmupLR", warmup_type="cubic"),
        "error",
        "scheduler.params.warmup_type",
        "not an allowed value",
    ),
    (
        scheduler("WarmupLR", warmup_max_lr=2e-5, warmup_type="linear"),
        "warning",
        "scheduler.params.warmup_max_lr",
        "same learning rate",
    ),
    (
        scheduler("WarmupLR", warmup_max_lr=1e-5, warmup_min_lr=1e-4, warmup_type="linear"),
        "error",
        "scheduler.params.warmup_min_lr",
        "above the peak",
    ),
    (
        scheduler("WarmupDecayLR", total_num_steps=100, warmup_num_steps=5, warmup_type="linear"),
        "error",
        "scheduler.params",
        "1e-3",
    ),
    (
        scheduler("WarmupLR", warmup_type="linear", last_batch_iteration=3),
        "error",
        "scheduler.params.last_batch_iteration",
        "full learning rate",
    ),
    (
        f'{{{ADAM}, "scheduler": {{"type": "WarmupLR"}}}}',
        "error",
        "scheduler",
        "params",
    ),
    (
        scheduler("OneCycle", cycle_min_lr=1e-6, cycle_max_lr=1e-5),
        "warning",
        "scheduler.params",
        "beta1 cycles between 0.9 and 0.8, beta2 is 0.99",
    ),
    (
        scheduler("StepLR", step_size=3).replace("{", '{"zero_optimization": {"stage": 1}, ', 1),
        "error",
        "scheduler.type",
        "PyTorch",
    ),
    (
        scheduler("WarmupLR", warmup_type="linear").replace("1e-5", "0.01"),
        "warning",
        "optimizer.params.lr",
        "fine-tuning",
    ),
]


@pytest.mark.parametrize(
    ("text", "severity", "path", "words"), BAD, ids=[f"{i}-{case[2]}" for i, case in enumerate(BAD)]
)
def test_bad_jsons(text: str, severity: str, path: str, words: str, keys: Catalogue) -> None:
    found = findings(text, keys)
    messages = [f"{f.severity} {f.key_path} {f.message} {f.hint}" for f in found]
    match = [f.severity == severity and f.key_path == path and words in f"{f.message} {f.hint}" for f in found]
    assert any(match), messages


@pytest.mark.parametrize(
    ("sizes", "world_size", "wrong"),
    [
        ((32, 2, 8), 2, False),
        ((32, 2, 8), 4, True),
        ((32, 2, 8), None, False),
        ((30, 2, 8), None, True),
        ((32, 3, "auto"), None, True),
        ((32, 2, "auto"), 3, True),
        ((32, "auto", "auto"), 5, True),
        (("auto", 2, 8), 5, False),
    ],
)
def test_batch_sizes_must_match(
    sizes: tuple[object, ...], world_size: int | None, wrong: bool, keys: Catalogue
) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    found = findings(json.dumps(dict(zip(names, sizes, strict=True))), keys, world_size)
    assert [f.key_path for f in found if f.severity == "error"] == ["train_batch_size"] * wrong


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_nan_and_inf_are_rejected(number: float, keys: Catalogue) -> None:
    """YAML can write them: .inf and .nan."""
    data = {"train_batch_size": number, "gradient_clipping": number, "zero_optimization": {"sub_group_size": number}}
    found = lint(from_mapping(data, "job.yaml"), Target("cuda"), keys)
    wrong = {one.key_path for one in found if one.severity == "error"}
    assert wrong == {"train_batch_size", "gradient_clipping", "zero_optimization.sub_group_size"}


def test_hpz_must_divide_the_world(keys: Catalogue) -> None:
    text = zero(stage=3, zero_hpz_partition_size=8)
    assert findings(text, keys, 16) == []
    assert [f.key_path for f in findings(text, keys, 12)] == ["zero_optimization.zero_hpz_partition_size"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_presets_lint_clean(preset: Path, keys: Catalogue) -> None:
    assert lint(read_ds_config(preset), Target("cuda"), keys) == []


def test_a_complete_valid_json_lints_clean(keys: Catalogue) -> None:
    text = """{
      "train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8,
      "gradient_clipping": 1.0, "bf16": {"enabled": true}, "steps_per_print": 100, "_note": "mine",
      "zero_optimization": {"stage": 3, "overlap_comm": true, "stage3_prefetch_bucket_size": 5e7,
                            "offload_optimizer": {"device": "cpu", "pin_memory": true}},
      "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0}},
      "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 100,
                    "warmup_min_lr": 0, "warmup_max_lr": 1e-5, "warmup_type": "linear"}}
    }"""
    assert findings(text, keys, 2) == []


def test_findings_have_the_location_of_the_key(keys: Catalogue) -> None:
    found = findings('{\n  "zero_optimization": {\n    "stage": 2,\n    "overlap_com": true\n  }\n}', keys)
    assert [(f.line, f.column) for f in found] == [(4, 5)]


BROKEN = """{
  // kept
  "train_bacth_size": "8",   # kept too
  "fp16": {"enabled": True,
           "loss_scale": 0},
  "zero_optimization": {"stage": 2, "cpu_offload": true, "overlap_com": "true"},
  "optimizer": {"type": "Adam", "params": {"lr": "1e-5", "weight_decy": 0.1}},
  "nebula": {}
}
"""
FIXED = """{
  // kept
  "train_batch_size": 8,   # kept too
  "fp16": {"enabled": true,
           "loss_scale": 0},
  "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": true},
  "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "weight_decay": 0.1}},
  "nebula": {}
}
"""


def test_a_key_is_not_renamed_to_an_existing_one(keys: Catalogue) -> None:
    text = '{"train_bacth_size": 8, "train_batch_size": 16}'
    assert apply_fixes(text, findings(text, keys)) == text


NEAR_MISSES = [
    '{"float16": {"enabled": true}}',
    '{"fp16": {"enabled": true, "bf16_master_weights_and_grads": true}}',
    zero(stage=2, offload_optimizer={"device": "gpu"}),
    zero(stage=2, offload_optimizer={"device": "cuda"}),
    zero(stage=3, offload_param={"device": "disk"}),
    zero(stage=2, cpu_offload=False),
    scheduler("WarmupCosineLR", total_num_steps=9, warmup_num_steps=2, warmup_type="linear", warmup_max_ratio=1),
    scheduler("OneCycle", cycle_min_lr=1e-6, cycle_max_lr=1e-5, cycle_moo_mom=0.9),
    '{"fp16": {"enabled": "None"}}',
    '{"optimiser_type": "AdamW"}',
]


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_an_ambiguous_mistake_is_reported_but_not_fixed(text: str, keys: Catalogue) -> None:
    found = findings(text, keys)
    assert found
    assert apply_fixes(text, found) == text


def test_the_aliases_of_zero_3_keys_are_deepspeeds(keys: Catalogue) -> None:
    """All are the names without stage3_, which is how the launcher looks up the values."""
    aliases = {name: key.alias for name, key in keys.blocks["zero_optimization"].keys.items() if key.alias}
    assert {"prefetch_bucket_size", "gather_16bit_weights_on_model_save"} < set(aliases)
    assert all(alias == f"stage3_{name}" for name, alias in aliases.items())


@pytest.fixture
def other_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Makes the shipped catalogue that of another version, with an empty cache; returns DeepSpeed's output."""
    monkeypatch.setattr(catalogue, "_torch_version", lambda: "0.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw: dict[str, Any] = json.loads(catalogue.SHIPPED.read_text())
    return raw


def test_a_cache_that_cannot_be_written_is_ignored(
    other_torch: dict[str, Any], keys: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in place of the cache folder, and a user without a home folder, as in containers."""
    monkeypatch.setattr(catalogue, "_query_deepspeed", lambda: other_torch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    assert load_catalogue() == keys
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    assert load_catalogue() == keys


def test_the_keys_of_another_version_are_queried_once(
    other_torch: dict[str, Any], keys: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[None] = []
    monkeypatch.setattr(catalogue, "_query_deepspeed", lambda: queries.append(None) or other_torch)
    assert [load_catalogue() == keys, load_catalogue() == keys] == [True, True]
    assert len(queries) == 1


@pytest.mark.usefixtures("other_torch")
def test_lint_works_if_deepspeed_cannot_be_queried(
    keys: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; print('welcome', flush=True); os._exit(0)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = load_catalogue()
    assert found.warning is not None
    assert "could not find out which keys" in found.warning and "'welcome" in found.warning
    assert replace(found, warning=None) == keys
    file = tmp_path / "ds.json"
    file.write_text('{"train_bacth_size": 8}')
    status, output = run(str(file))
    assert status == 2
    assert f"warning: {found.warning}" in output
    assert "Did you mean train_batch_size?" in output


@pytest.mark.parametrize(
    ("part", "left"),
    [
        pytest.param("blocks", {"": {"keys": {}, "model": False}}, id="a DeepSpeedConfig that reads no keys"),
        pytest.param("optimizers", {}, id="no optimizers"),
        pytest.param("schedulers", None, id="another format"),
    ],
)
def test_an_implausible_catalogue_is_not_used(
    part: str, left: Any, other_torch: dict[str, Any], keys: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_query_deepspeed", lambda: {**other_torch, part: left})
    found = load_catalogue()
    assert found.warning is not None
    assert found.blocks == keys.blocks


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(lint_command)
    done = CliRunner().invoke(app, ["--device", "cuda", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return done.exit_code, done.output


def test_fix_corrects_what_is_unambiguous_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(BROKEN)
    status, output = run(str(file), "--fix")
    assert file.read_text() == FIXED
    assert status == 2
    assert f"{file}:8:3: error: nebula:" in output
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"]
    assert f'{file}:3: fixed: "train_bacth_size" → "train_batch_size"' in output
    assert f'{file}:3: fixed: "8" → 8' in output
    assert f'{file}:6: fixed: "cpu_offload": true → "offload_optimizer": {{"device": "cpu"}}' in output
    assert "8 fixed, 1 error" in output
    assert "fixed" not in run(str(file), "--fix")[1]


def test_one_broken_file_does_not_hide_the_others(tmp_path: Path) -> None:
    good, broken, missing = (tmp_path / name for name in ("good.json", "broken.json", "none.json"))
    good.write_text('{"train_bacth_size": 8}')
    broken.write_text('{\n"zero_optimization": {')
    status, output = run("--fix", str(missing), str(good), str(broken))
    assert status == 2
    assert good.read_text() == '{"train_batch_size": 8}'
    assert f"{missing}: error: file not found" in output
    assert f"{broken}:2: error: not valid JSON: the text ends inside an object" in output
    assert "3 files: 1 fixed, 2 errors" in output
    assert "job file" not in output
    rows = json.loads(run("--json", str(good), str(broken))[1])
    assert [(row["file"], row["line"], row["severity"]) for row in rows] == [(str(broken), 2, "error")]


def test_the_command_prints_location_severity_and_hint(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{\n  "train_bacth_size": 8\n}\n')
    status, output = run(str(file))
    assert status == 2
    assert f"{file}:2:3: error: train_bacth_size:" in output
    assert "Did you mean train_batch_size? (--fix writes it)" in output
    file.write_text('{"train_batch_size": 8, "gradient_clipping": 0}')
    assert run(str(file))[0] == 0


def test_json_output_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}')
    status, output = run(str(file), "--json", "--world-size", "2")
    (row,) = json.loads(output)
    assert status == 2
    assert row["file"] == str(file)
    assert (row["line"], row["column"], row["severity"], row["key_path"], row["fix"]) == (
        1,
        2,
        "error",
        "train_batch_size",
        False,
    )
    file.write_text('{"train_bacth_size": 8}')
    (row,) = json.loads(run(str(file), "--json", "--fix")[1])
    assert (row["severity"], row["line"], row["before"], row["after"]) == (
        "fixed",
        1,
        '"train_bacth_size"',
        '"train_batch_size"',
    )

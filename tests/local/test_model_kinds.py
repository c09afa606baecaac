"""Which models are fine-tuned, which are refused and why, and the losses that a model's kind adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import RequestError
from launcher.job.schema import ModelSection
from launcher.plan.facts import ModelFacts
from launcher.prepare.model_facts import measure_model
from launcher.prepare.small_config import small_config
from launcher.prepare.small_model_probe import probe_small_model

pytestmark = pytest.mark.local

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def saved(folder: Path, class_name: str, **options: Any) -> Path:
    """A checkpoint of the class with random weights. Options that are None are left out."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    options = {name: value for name, value in {**SIZES, **options}.items() if value is not None}
    model_class(model_class.config_class(**options)).save_pretrained(folder)
    return folder


def measured(folder: Path, **section: Any) -> ModelFacts:
    return measure_model(folder, ModelSection(name_or_path=str(folder), **section))


def refused(folder: Path, **section: Any) -> str:
    """The message and the hint, which a user can act on."""
    with pytest.raises(RequestError) as caught:
        measured(folder, **section)
    (problem,) = caught.value.problems
    assert problem.key == "model.name_or_path"
    assert problem.hint
    return f"{problem.message}; {problem.hint}"


def with_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("BertForMaskedLM", {}),
        ("RobertaForMaskedLM", {}),
        ("ElectraForMaskedLM", {"embedding_size": 32}),
        (
            "XLNetLMHeadModel",
            {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None},
        ),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(class_name: str, options: dict, tmp_path: Path) -> None:
    assert "is not causal: changing a later token changes earlier logits" in refused(
        saved(tmp_path, class_name, **options)
    )


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        ("GPTNeoXForCausalLM", {}),
        ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("BertLMHeadModel", {"is_decoder": True}),
        ("Gemma2ForCausalLM", {"head_dim": 8, "num_key_value_heads": 2}),
        ("FalconForCausalLM", {}),
        ("MixtralForCausalLM", EXPERTS),
    ],
)
def test_a_causal_model_is_measured(class_name: str, options: dict, tmp_path: Path) -> None:
    folder = saved(tmp_path, class_name, **options)
    facts = measured(folder)
    assert (facts.hidden_size, facts.layers, facts.attention_heads, facts.vocab_size) == (32, 2, 4, 300)
    assert facts.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert not any("causal" in note for note in facts.notes)


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
        ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}),
    ],
)
def test_an_encoder_decoder_is_refused(class_name: str, options: dict, tmp_path: Path) -> None:
    folder = saved(tmp_path, class_name, decoder_start_token_id=0, **options)
    assert "is an encoder-decoder" in refused(folder)


@pytest.mark.parametrize(
    ("quantisation", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_quantised_weights_are_refused(quantisation: dict, method: str, tmp_path: Path) -> None:
    folder = with_config(saved(tmp_path, "LlamaForCausalLM"), quantization_config=quantisation)
    assert f"the weights are quantised ({method}), and quantised weights cannot be trained" in refused(folder)
    assert "QLoRA" in refused(folder, lora={})


def test_the_quantised_text_part_of_a_nested_config_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, "LlamaForCausalLM")
    text = {**SIZES, "model_type": "gemma3_text", "quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert "(awq)" in refused(folder)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_weights_without_a_word_in_the_config_are_refused(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    file = saved(tmp_path, "LlamaForCausalLM") / "model.safetensors"
    weights = load_file(file)
    weights = {key: value.to(dtype) if "proj" in key else value for key, value in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert f"stores model.layers.0.mlp.down_proj.weight as {name}" in refused(tmp_path)
    assert "cannot be trained" in refused(tmp_path, lora={})


def test_integer_buffers_are_not_quantised_weights(tmp_path: Path) -> None:
    file = saved(tmp_path, "LlamaForCausalLM") / "model.safetensors"
    buffers = {"model.layers.0.mask": torch.ones(3, dtype=torch.uint8), "position_ids": torch.arange(3)}
    save_file({**load_file(file), **buffers}, file, metadata={"format": "pt"})
    assert measured(tmp_path).parameters > 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_refused(whole: bool, tmp_path: Path) -> None:
    """transformers would put the adapter into the model, or load another base model."""
    folder = saved(tmp_path, "LlamaForCausalLM")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    (folder / "adapter_model.safetensors").touch()
    if not whole:
        (folder / "model.safetensors").unlink()
    assert "contains an adapter (adapter_config.json), not only a model" in refused(folder)
    assert "name the base model, org/base" in refused(folder)


def test_a_weight_file_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path, "LlamaForCausalLM") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "model.safetensors cannot be read as safetensors" in refused(tmp_path)
    assert "git lfs pull" in refused(tmp_path)


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "classifier", "LlamaForSequenceClassification")
    assert "lacks lm_head.weight: they would be initialised randomly" in refused(tmp_path / "classifier")
    with_config(saved(tmp_path / "grown", "LlamaForCausalLM"), num_hidden_layers=3)
    assert "lacks model.layers.2." in refused(tmp_path / "grown")
    with_config(saved(tmp_path / "wide", "LlamaForCausalLM"), vocab_size=308)
    assert "has lm_head.weight, model.embed_tokens.weight in another shape" in refused(tmp_path / "wide")


def test_weights_that_are_not_used_are_named(tmp_path: Path) -> None:
    facts = measured(with_config(saved(tmp_path, "LlamaForCausalLM"), num_hidden_layers=1))
    assert any("model.layers.1.input_layernorm.weight" in note and "6 more" in note for note in facts.notes)


def test_a_model_for_a_script_of_the_users_own_may_be_any(tmp_path: Path) -> None:
    folder = saved(tmp_path, "BertForMaskedLM")
    section = ModelSection(name_or_path=str(folder))
    assert measure_model(folder, section, trained_here=False).hidden_size == 32


def test_configs_with_lists_and_without_attention_heads(tmp_path: Path) -> None:
    mamba = measured(saved(tmp_path / "mamba", "MambaForCausalLM", state_size=4, num_attention_heads=None))
    assert (mamba.hidden_size, mamba.attention_heads, mamba.whole_attention, mamba.layers) == (32, 0, False, 2)
    options = {
        "hidden_size": 64,
        "intermediate_size": [128, 128],
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    gemma = measured(saved(tmp_path / "gemma", "Gemma3nForCausalLM", **options))
    assert (gemma.hidden_size, gemma.intermediate_size, gemma.key_value_heads, gemma.vocab_size) == (64, 128, 2, 300)


def test_the_vocabulary_is_that_of_the_embeddings(tmp_path: Path) -> None:
    """Llama 3.2 Vision and others have more rows than their config's vocab_size says."""
    config = AutoConfig.for_model("moshi", **{**SIZES, "ffn_dim": 64, "num_codebooks": 2})
    with torch.device("meta"):
        rows = AutoModelForCausalLM.from_config(config).get_input_embeddings().weight.shape[0]
    assert rows == 301
    folder = tmp_path / "moshi"
    transformers.MoshiForCausalLM(config).save_pretrained(folder)
    assert measured(folder).vocab_size == 301


UNUSUAL = """bloom blt codegen ctrl deepseek_v3 dots3_note_text falcon falcon_mamba gemma3n_text gemma4_text git gpt2
gpt_bigcode gpt_neo jamba jetmoe mamba2 mpt nemotron_h openai-gpt recurrent_gemma rwkv xlm xlnet zamba2"""


def default_sizes(folder: Path, kind: str) -> ModelFacts:
    """Measured from the config alone, as for a script of the user's own."""
    AutoConfig.for_model(kind).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return measure_model(folder, ModelSection(name_or_path=str(folder)), trained_here=False)


@pytest.mark.parametrize("kind", UNUSUAL.split())
def test_configs_that_name_sizes_in_ways_of_their_own_are_measured(kind: str, tmp_path: Path) -> None:
    facts = default_sizes(tmp_path, kind)
    assert min(facts.hidden_size, facts.intermediate_size, facts.layers, facts.vocab_size, facts.parameters) > 0


@pytest.mark.parametrize("kind", ["dbrx", "reformer"])
def test_a_config_that_its_class_does_not_take_is_refused_without_a_traceback(kind: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot build a causal language model from .*(AttributeError|Assertion)"):
        default_sizes(tmp_path, kind)


def test_a_shrunk_config_keeps_one_layer_of_each_kind() -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=26)
    small = small_config(config)
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert len(small.layer_types) == small.num_hidden_layers == 4


def test_a_large_model_is_probed_by_a_small_one_of_its_kind() -> None:
    """An encoder and a decoder of 110 million parameters, which are not built at that size."""
    for kind, causal in (("bert", False), ("gpt2", True)):
        config = AutoConfig.for_model(kind)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert probe_small_model(type(model), model.config, 110_000_000).causal is causal


def test_heads_of_a_prime_number_are_made_fewer_too() -> None:
    """Falcon 7B's 71: at its full width a probe takes minutes."""
    small = small_config(transformers.FalconConfig(hidden_size=4544, num_attention_heads=71))
    assert (small.num_attention_heads, small.hidden_size) == (1, 64)
    seen = probe_small_model(transformers.FalconForCausalLM, transformers.FalconConfig(), 7_000_000_000)
    assert (seen.causal, seen.failure) == (True, None)

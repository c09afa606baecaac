"""The FLOPs of small models without weights: by the formula of their architecture, and of a real training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig

from launcher.plan.flops import update_flops
from launcher.prepare.model_flops import forward_flops
from tests.unit.inputs import model_facts

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 64, 128, 3, 4, 320
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_llama_has_two_flops_per_weight_and_token_and_four_widths_per_pair() -> None:
    attention, mlp = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2, 3 * WIDTH * INNER
    weights = LAYERS * (attention + mlp) + WIDTH * VOCABULARY
    model = on_meta(LlamaConfig(**LLAMA))
    # The products with the rotary frequencies, half a head's size per token, are counted too.
    assert forward_flops(model) == (pytest.approx(2 * weights, rel=1e-3), 4 * WIDTH * LAYERS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_only_the_experts_of_a_token_count() -> None:
    config = MixtralConfig(**LLAMA, num_local_experts=8, num_experts_per_tok=2)
    attention, experts = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2, 2 * 3 * WIDTH * INNER
    weights = LAYERS * (attention + experts + 8 * WIDTH) + WIDTH * VOCABULARY
    assert forward_flops(on_meta(config))[0] == pytest.approx(2 * weights, rel=1e-3)


def test_a_model_without_attention_has_no_pairs() -> None:
    config = MambaConfig(hidden_size=WIDTH, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8)
    per_token, per_pair = forward_flops(on_meta(config))
    assert per_token > 2 * WIDTH * VOCABULARY and per_pair == 0


def test_code_that_needs_values_has_unknown_flops() -> None:
    class Model(torch.nn.Module):
        config = LlamaConfig(**LLAMA)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> int:
            return int(input_ids.sum())

    assert forward_flops(Model()) == (0.0, 0.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_training_step_has_the_flops_that_torch_counts(frozen: bool) -> None:
    config = GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    )
    per_token, per_pair = forward_flops(on_meta(config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or parameter.dim() == 1)
    # As under LoRA: the gradients of activations are needed in every layer.
    hidden = model.get_input_embeddings()(torch.zeros(2, 32, dtype=torch.long)).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).logits.sum().backward()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = model_facts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable_parameters=trained,
        flops_per_token=per_token,
        flops_per_pair=per_pair,
    )
    found = update_flops(facts, tokens=2 * 32, pairs=2 * 32 * 32)
    assert embeddings.requires_grad is not frozen
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)

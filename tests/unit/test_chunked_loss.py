"""The chunked loss and its gradients equal those of all logits, for any number of chunks and kind of output layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher import chunked_loss
from launcher.chunked_loss import LossLayer
from launcher.prepare.small_model_probe import probe_small_model
from launcher.worker.batches import IGNORED
from launcher.worker.loss import summed_loss, summed_losses

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}))


def batch_of(learned: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three sequences of 20 tokens, of which the first seven are not learned and the last three are padding."""
    ids = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 17:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, : 7 if learned else 20] = IGNORED
    return ids, mask, labels


def loss_and_gradients(model: Any, layer: LossLayer | None, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, *batch, layer=layer)
    (0.3 * loss).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("phi", {})],
)
def test_loss_and_gradients_equal_those_of_all_logits(chunk: int, kind: str, options: dict, monkeypatch) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda _: chunk)
    model = model_of(kind, **options)
    assert (model.get_output_embeddings().bias is not None) == (kind == "phi")
    whole, expected = loss_and_gradients(model, None, batch_of())
    chunked, found = loss_and_gradients(model, LossLayer(model), batch_of())
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_the_rounding_of_bfloat16_stays_that_of_the_loss_of_all_logits(monkeypatch) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda _: 7)
    batch = batch_of()
    model = model_of("llama").bfloat16()
    layer, weight = LossLayer(model), model.get_output_embeddings().weight
    exact = model_of("llama")
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    _, expected = loss_and_gradients(exact, None, batch)
    errors = []
    for each in (None, layer):
        _, found = loss_and_gradients(model, each, batch)
        assert all(gradient.dtype == torch.bfloat16 for gradient in found.values())
        errors.append(float((found["lm_head.weight"].float() - expected["lm_head.weight"]).abs().mean()))
    whole, chunked = errors
    assert weight.dtype == torch.bfloat16
    # Each chunk's product is rounded, and then their sum.
    assert chunked <= 1.5 * whole


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    model = model_of("llama", tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(False)
    whole, expected = loss_and_gradients(model, None, batch_of())
    chunked, found = loss_and_gradients(model, LossLayer(model), batch_of())
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert found.keys() == expected.keys() and "lm_head.weight" not in found
    torch.testing.assert_close(found["model.norm.weight"], expected["model.norm.weight"])


def test_a_micro_batch_with_nothing_to_learn_reaches_every_parameter() -> None:
    model = model_of("llama", tie_word_embeddings=False)
    loss, found = loss_and_gradients(model, LossLayer(model), batch_of(learned=False))
    assert loss == 0.0
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(bool((gradient == 0).all()) for gradient in found.values())


def test_an_evaluation_computes_no_gradients(monkeypatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(chunked_loss, "_add_product", refuse)
    model, batch = model_of("llama"), batch_of()
    with torch.no_grad():
        found = float(summed_loss(model, *batch, layer=LossLayer(model)))
        expected = float(summed_loss(model, *batch))
    with pytest.raises(AssertionError, match="a gradient was computed"):
        summed_loss(model, *batch, layer=LossLayer(model))
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_layer_returns_logits_again_after_the_loss_and_after_an_error() -> None:
    model, batch = model_of("llama"), batch_of()
    before = model(batch[0]).logits
    layer = LossLayer(model)
    summed_loss(model, *batch, layer=layer)
    torch.testing.assert_close(model(batch[0]).logits, before)
    ids, mask, labels = batch
    with pytest.raises(IndexError):
        summed_loss(model, ids, mask, labels[:, 1:], layer=layer)
    torch.testing.assert_close(model(batch[0]).logits, before)


def test_the_balance_loss_of_routers_is_added_as_for_all_logits() -> None:
    model = model_of("mixtral", num_local_experts=4, output_router_logits=True)
    whole = summed_losses(model, *batch_of(), router_coefficient=0.5)
    chunked = summed_losses(model, *batch_of(), router_coefficient=0.5, layer=LossLayer(model))
    torch.testing.assert_close(torch.stack(chunked), torch.stack(whole))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, True),
        ("qwen3", {"head_dim": 8}, True),
        ("phi", {}, True),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}, True),
        ("mixtral", {"num_local_experts": 4}, True),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_the_probe_finds_models_that_change_their_logits(kind: str, options: dict, expected: bool) -> None:
    model = model_of(kind, **options)
    found = probe_small_model(type(model), model.config, model.num_parameters())
    assert found.failure is None
    assert found.chunked_loss is expected


def test_a_layer_with_an_adapter_does_not_fit() -> None:
    plain, adapted = torch.nn.Linear(4, 4), type("Adapted", (torch.nn.Linear,), {})(4, 4)
    assert LossLayer.fits(SimpleNamespace(get_output_embeddings=lambda: plain))
    assert not LossLayer.fits(SimpleNamespace(get_output_embeddings=lambda: adapted))
    assert not LossLayer.fits(SimpleNamespace(get_output_embeddings=lambda: None))

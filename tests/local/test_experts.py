"""Mixtures of experts: the balance loss of their routers, and their blocks under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from launcher.errors import RequestError
from launcher.job.schema import ModelSection
from launcher.prepare.model_facts import measure_model
from launcher.token_store import TokenStore
from launcher.worker.batches import IGNORED, SampleOrder, Share, micro_batches
from launcher.worker.experts import gather_experts_together
from launcher.worker.loss import summed_losses
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.local.test_losses import zero_config
from tests.tiny_models import make_tiny_tokenizer

pytestmark = pytest.mark.local

COEFFICIENT = 5.0


def save_mixtral(folder: Path, *, asked: bool, experts: int = 4, top: int = 2) -> Path:
    """A Mixtral whose config asks for its routers' balance loss, or not."""
    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=top,
        max_position_embeddings=128,
        output_router_logits=asked,
        router_aux_loss_coef=COEFFICIENT,
        initializer_range=0.1,
        sliding_window=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def a_batch(padding: int) -> dict[str, torch.Tensor]:
    """Two sequences, the second shorter and both followed by padding; the first three tokens are not learned."""
    torch.manual_seed(1)
    ids = torch.randint(5, 300, (2, 16 + padding))
    mask = torch.ones_like(ids)
    mask[:, 16:] = 0
    mask[1, 10:] = 0
    ids[mask == 0] = 1
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :3] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_of(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over the learned tokens, and the routers' part of it."""
    learned = (batch["labels"][:, 1:] != IGNORED).sum()
    loss, router = summed_losses(model, **batch, **options)
    return loss / learned, router / learned


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_micro_batch_is_that_of_transformers(fused: bool, checkpointing: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_mixtral(tmp_path, asked=True))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    batch = a_batch(padding=3)
    own = model(**batch)
    own.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    loss, router = losses_of(model, batch, fused=fused, router_coefficient=COEFFICIENT)
    loss.backward()
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert router.item() == pytest.approx(COEFFICIENT * own.aux_loss.item(), rel=1e-5)
    assert router.item() > COEFFICIENT
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    plain, nothing = losses_of(model, batch)
    assert plain.item() == pytest.approx(own.loss.item() - router.item(), rel=1e-4)
    assert nothing.item() == 0.0


def test_padding_does_not_count_in_the_balance_loss(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_mixtral(tmp_path, asked=True))
    short = a_batch(0)
    alone = losses_of(model, short, router_coefficient=COEFFICIENT)[1].item()
    long = {
        "input_ids": nn.functional.pad(short["input_ids"], (0, 20), value=1),
        "attention_mask": nn.functional.pad(short["attention_mask"], (0, 20)),
        "labels": nn.functional.pad(short["labels"], (0, 20), value=IGNORED),
    }
    padded = losses_of(model, long, router_coefficient=COEFFICIENT)[1].item()
    assert padded == pytest.approx(alone, rel=1e-5)


def test_the_plan_names_the_coefficient_or_notes_that_there_is_no_balance_loss(tmp_path: Path) -> None:
    facts = {}
    for asked in (True, False):
        folder = save_mixtral(tmp_path / str(asked), asked=asked)
        facts[asked] = measure_model(folder, ModelSection(name_or_path=str(folder)))
    assert (facts[True].router_loss_coefficient, facts[True].notes) == (COEFFICIENT, ())
    assert facts[False].router_loss_coefficient is None
    (note,) = facts[False].notes
    assert "without a balance loss" in note and "output_router_logits: true" in note


def test_ranks_cannot_share_sequences_that_have_a_balance_loss(job_dict: dict, tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path, asked=True)
    with pytest.raises(RequestError, match="the routers' load-balancing loss"):
        plan_of(merged(job_dict, model={"name_or_path": str(folder), "sequence_parallel_size": 2}))


def test_updates_weight_the_balance_loss_by_learned_tokens(job_dict: dict, tmp_path: Path) -> None:
    """Two ranks under ZeRO-3 with accumulation: the mean of transformers' losses, each weighted by its tokens."""
    folder = save_mixtral(tmp_path / "model", asked=True, experts=8, top=1)
    rate = {"peak_lr": 5e-3, "warmup": 1, "allow_unsafe": True}
    train = {"max_steps": 3, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    model = {"name_or_path": str(folder)}
    plan = plan_of(merged(job_dict, model=model, train=train, schedule=rate, deepspeed=zero_config(3)))
    assert plan.gradient_accumulation_steps == 2
    assert plan.training.model.router_loss_coefficient == COEFFICIENT
    run = fine_tuned(plan, tmp_path)
    lines = run.metrics()

    plain = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(plain.parameters(), eps=1e-8, weight_decay=0.0)
    store = TokenStore(Path(plan.training.data.train.folder))
    order = SampleOrder(len(store), plan.job.train.seed)
    for update, line in enumerate(lines):
        loss = router = torch.zeros(())
        for rank in range(2):
            here = micro_batches(store, order, Share(rank, 2, 4, 2), range(update, update + 1), 16 * update)
            for batch in here:
                own = plain(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
                share = (batch.labels[:, 1:] != IGNORED).sum() / batch.update_targets
                loss, router = loss + share * own.loss, router + share * COEFFICIENT * own.aux_loss
        assert line["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert line["router_loss"] == pytest.approx(router.item(), rel=2e-5)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=5e-4)
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
    # What is evaluated is the text, whatever the routers do.
    assert run.evaluations()[0]["loss"] < 8 < lines[0]["loss"]
    assert json.loads((run.export / "config.json").read_text())["output_router_logits"] is True


def test_blocks_with_a_list_of_experts_are_units_of_zero_3(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    model = nn.ModuleDict({"first": Block(), "layers": nn.ModuleList([Block(), nn.Linear(4, 4)])})
    assert gather_experts_together(model) == (Block,)
    marked = [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]
    assert marked == ["first", "layers.0"]
    fused = AutoModelForCausalLM.from_pretrained(save_mixtral(tmp_path, asked=False))
    assert gather_experts_together(fused) == ()

"""Frozen weights, weight decay, and the switches that change memory or speed and not the task, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import RequestError
from launcher.job.schema import ModelSection
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.prepare.model_sizes import whole_attention
from launcher.run_dir import RunDir
from launcher.trainable import set_trainable
from launcher.worker import scheduler
from launcher.worker.batches import SampleOrder, Share, TokenStore, micro_batches
from launcher.worker.checkpoint import Checkpoints, Progress
from launcher.worker.evaluate import evaluate
from launcher.worker.export import export_model
from launcher.worker.loss import summed_loss
from launcher.worker.model import load_model, make_engine
from launcher.worker.ranks import Ranks
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.local.test_losses import zero_config
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_process")]

UPDATES, BATCH = 4, 8
ADAPTERS = {"target_modules": ["q_proj", "v_proj"]}
FROZEN = ["model.embed_tokens", "model.layers.0.*", "*.norm"]


def one_rank() -> Ranks:
    return Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), host="here")


def an_engine(job_dict: dict, **sections: Any) -> tuple[Plan, Any]:
    """The plan of one rank, and its engine before the first update."""
    alone = {"processes_per_node": 1, "gpus_per_node": 0}
    train = {"max_steps": UPDATES, "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH}
    train["weight_decay"] = 0.1
    plan = plan_of(merged(merged(job_dict, cluster=alone, train=train), **sections))
    engine = make_engine(plan, load_model(plan))
    scheduler.begin(engine, plan)
    return plan, engine


def batches(plan: Plan, updates: range) -> Any:
    store = TokenStore(Path(plan.training.data.train.folder))
    order, share = SampleOrder(len(store), plan.job.train.seed), Share(0, 1, BATCH, 1)
    return micro_batches(store, order, share, updates, updates.start * BATCH)


def trained(plan: Plan, engine: Any, updates: range = range(UPDATES)) -> list[float]:
    """The mean loss of each update."""
    losses = []
    for batch in batches(plan, updates):
        loss = summed_loss(engine, batch.input_ids, batch.attention_mask, batch.labels) / batch.update_targets
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def plainly_trained(plan: Plan) -> list[float]:
    """What a PyTorch loop loses that trains the second layer alone, its norms without weight decay."""
    model = AutoModelForCausalLM.from_pretrained(plan.training.model.folder)
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    parts = [[p for p in model.parameters() if p.requires_grad and (p.dim() > 1) == large] for large in (True, False)]
    groups = [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    rates, losses = planned_lrs(plan), []
    for batch in batches(plan, range(UPDATES)):
        for group in optimizer.param_groups:
            group["lr"] = rates(batch.update)
        optimizer.zero_grad()
        loss = summed_loss(model, batch.input_ids, batch.attention_mask, batch.labels) / batch.update_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_weights_stay_and_the_rest_learns(job_dict, tmp_path, stage):
    schedule = {"peak_lr": 2e-2, "allow_unsafe": True}
    sections = {"model": {"freeze": FROZEN}, "deepspeed": zero_config(stage), "schedule": schedule}
    plan, engine = an_engine(job_dict, **sections)
    before = weights(engine)
    learns = {name for name in before if name.startswith("model.layers.1.")}
    assert plan.training.model.trainable_parameters == sum(before[name].numel() for name in learns)
    checkpoints = Checkpoints(RunDir.create(tmp_path, "frozen"), plan, one_rank(), lambda *_, **__: None)
    losses = trained(plan, engine, range(2))
    saved = checkpoints.save(engine, Progress(2, 2 * BATCH), plan.sha256, {})
    losses += trained(plan, engine, range(2, UPDATES))
    np.testing.assert_allclose(losses, plainly_trained(plan), rtol=2e-5)

    after = weights(engine)
    assert {name for name in before if not torch.equal(before[name], after[name])} == learns
    export_model(engine, plan, one_rank(), tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(exported[name], after[name]) for name in after)

    resumed = make_engine(plan, load_model(plan))
    Checkpoints(RunDir(saved.parent.parent), plan, one_rank(), lambda *_, **__: None).load(
        resumed, Start(checkpoint=str(saved), update=2, samples=2 * BATCH)
    )
    scheduler.resume(resumed)
    assert trained(plan, resumed, range(2, UPDATES)) == losses[2:]


def test_a_tied_head_does_not_hide_that_all_is_frozen(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(RequestError, match="nothing is left to train"):
        set_trainable(model, ModelSection(name_or_path=str(tiny_model), freeze=["model"]))


@pytest.mark.parametrize(("stage", "lora"), [(0, None), (2, None), (3, None), (3, ADAPTERS)])
def test_norms_and_biases_have_no_weight_decay_in_the_optimizer(job_dict, stage, lora):
    """What each parameter's group says, as the optimizer that steps has it."""
    _, engine = an_engine(job_dict, model={"lora": lora}, deepspeed=zero_config(stage))
    module, optimizer = engine.module, engine.optimizer
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in module.named_parameters() if p.requires_grad}
    sizes = {
        decayed: sum(shape.numel() for shape in shapes.values() if (len(shape) > 1) == decayed)
        for decayed in (True, False)
    }
    assert sizes[True] > 0
    found = {True: 0, False: 0}
    for index, group in enumerate(optimizer.param_groups):
        found[group["weight_decay"] == 0.1] += elements(optimizer, index, stage)
        assert group["weight_decay"] in (0.1, 0.0)
    assert found == sizes
    assert (sizes[False] == 0) == (lora is not None)
    if lora:
        assert all(".lora_" in name for name in shapes)


def elements(optimizer: Any, index: int, stage: int) -> int:
    """How many elements the optimizer's group holds, without ZeRO's padding."""
    if stage == 0:
        return sum(parameter.numel() for parameter in optimizer.param_groups[index]["params"])
    groups = optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups
    return sum(getattr(p, "ds_numel", p.numel()) for p in groups[index])


def kept_bytes(model: Any, batch: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = summed_loss(model, batch.input_ids, batch.attention_mask, batch.labels)
    loss.backward()
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(job_dict):
    found = []
    for model in ({}, {"gradient_checkpointing": True}):
        plan = plan_of(merged(job_dict, model=model))
        loaded = load_model(plan)
        batch = next(batches(plan, range(1)))
        kept = kept_bytes(loaded, batch)
        found.append((kept, {name: p.grad.clone() for name, p in loaded.named_parameters()}))
    (plain, gradients), (checkpointed, others) = found
    assert checkpointed < 0.6 * plain
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_compiled_model_with_adapters_has_the_same_losses(job_dict, tmp_path):
    from torch._dynamo.utils import counters

    # Every layer would be compiled for itself.
    make_tiny_model(tmp_path / "model", layers=1)
    model = {"name_or_path": str(tmp_path / "model"), "lora": ADAPTERS}
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        plan, engine = an_engine(job_dict, model={**model, "torch_compile": compiled}, deepspeed=zero_config(2))
        found.append([trained(plan, engine, range(1)) for _ in range(2)])
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    np.testing.assert_allclose(found[1], found[0], rtol=2e-5)


@pytest.mark.parametrize(("stage", "model"), [(2, {}), (3, {"lora": ADAPTERS, "gradient_checkpointing": True})])
def test_two_ranks_share_each_sequence_and_lose_the_same(job_dict, tmp_path, stage, model):
    """Ulysses on two ranks against one rank with whole sequences: the same gradients, losses and evaluations."""
    schedule = {"peak_lr": 5e-3, "allow_unsafe": True}
    plan, engine = an_engine(job_dict, model=model, deepspeed=zero_config(stage), schedule=schedule)
    before = evaluate(engine, TokenStore(Path(plan.training.data.eval.folder)), BATCH, one_rank()).loss
    losses, norms = trained(plan, engine), engine.get_global_grad_norm()
    after = evaluate(engine, TokenStore(Path(plan.training.data.eval.folder)), BATCH, one_rank()).loss

    model = {**model, "sequence_parallel_size": 2}
    train = {"max_steps": UPDATES, "train_batch_size": BATCH, "weight_decay": 0.1}
    shared = plan_of(merged(job_dict, model=model, train=train, deepspeed=zero_config(stage), schedule=schedule))
    assert (shared.world.size, shared.world.data_parallel_size, shared.gradient_accumulation_steps) == (2, 1, 2)
    run = fine_tuned(shared, tmp_path)
    lines = run.metrics()
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=2e-5)
    assert lines[-1]["grad_norm"] == pytest.approx(float(norms), rel=2e-4)
    assert lines[-1]["samples"] == UPDATES * BATCH
    np.testing.assert_allclose([line["loss"] for line in run.evaluations()], [before, after], rtol=2e-5)


def test_the_loss_left_to_the_model_is_the_same_sum(job_dict):
    """The interface that liger-kernel shares with transformers' own causal loss."""
    plan = plan_of(job_dict)
    batch = next(batches(plan, range(1)))
    found = []
    for fused in (False, True):
        model = load_model(plan)
        loss = summed_loss(model, batch.input_ids, batch.attention_mask, batch.labels, fused=fused)
        loss.backward()
        found.append((loss.item(), model.model.embed_tokens.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    assert batch.update_targets > 1


def test_only_models_whose_layers_attend_to_everything_may_share_sequences():
    """As their configs say: a window, or layers of other kinds, would be lost in the exchange."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    found = {}
    for kind, options in {
        "llama": {},
        "qwen3": {"head_dim": 8},
        "mistral": {"sliding_window": 16},
        "gemma3_text": {"head_dim": 8},
    }.items():
        config = AutoConfig.for_model(kind, **sizes, **options, vocab_size=64)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found[kind] = whole_attention(config.get_text_config(), model)
    assert found == {"llama": True, "qwen3": True, "mistral": False, "gemma3_text": False}

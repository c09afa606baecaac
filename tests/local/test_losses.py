"""The launcher's updates against a plain single-process PyTorch loop, and the export against the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.plan.schema import Plan
from launcher.token_store import TokenStore
from launcher.worker.batches import IGNORED
from launcher.worker.loss import summed_loss
from tests.local.rank_runs import fine_tuned, merged, plan_of
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.local

PEAK, WARMUP, UPDATES, BATCH = 5e-3, 3, 6, 16


def plain_loop(model_folder: Path, store: TokenStore, held_out: TokenStore, seed: int) -> dict:
    """Losses, rates and gradient norms of a loop that puts the whole batch through at once, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found = {"loss": [], "lr": [], "grad_norm": [], "eval": [evaluated(model, held_out)]}
    stream = np.concatenate([np.random.RandomState([seed, e]).permutation(len(store)) for e in range(9)])
    for update in range(UPDATES):
        rate = PEAK * (update + 1) / (WARMUP + 1)
        if update > WARMUP:
            low = PEAK / (WARMUP + 1)
            rate = low + (PEAK - low) * (UPDATES - update) / (UPDATES - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        samples = stream[update * BATCH : (update + 1) * BATCH]
        total, count = 0.0, 0
        for sample in samples:
            ids, learned = (torch.from_numpy(np.array(part, dtype=np.int64)) for part in store[int(sample)])
            logits = model(ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            total = total + (losses * learned[1:]).sum()
            count += int(learned[1:].sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found["loss"].append(loss.item())
        found["lr"].append(rate)
        found["grad_norm"].append(norm.item())
    found["eval"].append(evaluated(model, held_out))
    return found


@torch.no_grad()
def evaluated(model, store: TokenStore) -> float:
    total = count = 0.0
    for sample in range(len(store)):
        ids, learned = (torch.from_numpy(np.array(part, dtype=np.int64)) for part in store[sample])
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total += float((losses * learned[1:]).sum())
        count += int(learned[1:].sum())
    return total / count


def zero_config(stage: int) -> dict:
    # The presets' bucket sizes follow the hidden size; a tiny model needs its parameters really partitioned.
    extra = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **extra}}


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 4), (2, 1), (3, 4)])
def test_zero_stages_make_the_updates_of_a_plain_loop(stage, accumulation, job_dict, tmp_path):
    plan = plan_of(
        merged(
            job_dict,
            train={
                "max_steps": UPDATES,
                "train_batch_size": BATCH,
                "train_micro_batch_size_per_gpu": BATCH // 2 // accumulation,
            },
            schedule={"peak_lr": PEAK, "warmup": WARMUP, "allow_unsafe": True},
            deepspeed=zero_config(stage),
        )
    )
    assert plan.gradient_accumulation_steps == accumulation
    assert plan.training.chunked_loss
    run = fine_tuned(plan, tmp_path)
    held_out = TokenStore(Path(plan.training.data.eval.folder))
    plain = plain_loop(
        Path(plan.training.model.folder),
        TokenStore(Path(plan.training.data.train.folder)),
        held_out,
        plan.job.train.seed,
    )

    lines = run.metrics()
    assert [line["update"] for line in lines] == list(range(UPDATES))
    assert [line["samples"] for line in lines] == [BATCH * (u + 1) for u in range(UPDATES)]
    np.testing.assert_allclose([line["lr"] for line in lines], plain["lr"], rtol=1e-12)
    np.testing.assert_allclose([line["loss"] for line in lines], plain["loss"], rtol=2e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], plain["grad_norm"], rtol=2e-4)
    assert all(0 < line["data_seconds"] < line["step_seconds"] for line in lines)
    evaluations = [line["loss"] for line in run.evaluations()]
    np.testing.assert_allclose(evaluations, plain["eval"], rtol=2e-5)
    assert evaluations[-1] < evaluations[0]

    exported = AutoModelForCausalLM.from_pretrained(run.export)
    assert exported.config.tie_word_embeddings
    assert exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()
    np.testing.assert_allclose(evaluated(exported, held_out), evaluations[-1], rtol=1e-5)
    assert list(run.export.glob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(run.export).chat_template


def losses_of(job_dict, tmp_path, **sections) -> tuple[list[float], object]:
    train = {"max_steps": UPDATES, "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH // 2}
    schedule = {"peak_lr": PEAK, "warmup": WARMUP, "allow_unsafe": True}
    run = fine_tuned(plan_of(merged(job_dict, train=train, schedule=schedule, **sections)), tmp_path)
    return [line["loss"] for line in run.metrics()], run


def test_bfloat16_checkpointed_activations_and_untied_weights(job_dict, tmp_path):
    """What changes memory or precision and not the task: losses stay those of plain float32."""
    plain, _ = losses_of(job_dict, tmp_path / "plain", deepspeed=zero_config(2))
    checkpointed, _ = losses_of(
        job_dict, tmp_path / "checkpointed", model={"gradient_checkpointing": True}, deepspeed=zero_config(2)
    )
    np.testing.assert_allclose(checkpointed, plain, rtol=1e-6)
    half, run = losses_of(job_dict, tmp_path / "half", model={"dtype": "bfloat16"}, deepspeed=zero_config(3))
    np.testing.assert_allclose(half, plain, rtol=2e-2)
    assert AutoModelForCausalLM.from_pretrained(run.export, dtype="auto").dtype == torch.bfloat16

    untied = tmp_path / "untied-model"
    make_tiny_model(untied, tied=False)
    _, run = losses_of(job_dict, tmp_path / "untied", model={"name_or_path": str(untied)}, deepspeed=zero_config(3))
    exported = AutoModelForCausalLM.from_pretrained(run.export)
    assert not torch.equal(exported.lm_head.weight, exported.model.embed_tokens.weight)
    held_out = TokenStore(Path(Plan.from_json(run.plan_file.read_text()).training.data.eval.folder))
    np.testing.assert_allclose(evaluated(exported, held_out), run.evaluations()[-1]["loss"], rtol=1e-5)


def test_a_micro_batch_with_nothing_to_learn_has_a_loss_of_zero_in_float16():
    logits = torch.full((2, 512, 32000), -3.0, dtype=torch.float16, requires_grad=True)
    ids = torch.zeros(2, 512, dtype=torch.long)
    loss = summed_loss(lambda **_: SimpleNamespace(logits=logits), ids, ids, torch.full_like(ids, IGNORED))
    assert loss.item() == 0.0
    loss.backward()
    assert bool((logits.grad == 0).all())

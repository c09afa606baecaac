"""Packed sequences on real ranks: the updates of a plain loop over single sequences, also after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.plan.schema import Plan
from launcher.run_dir import RunDir
from launcher.token_store import TokenStore
from launcher.worker.batches import BinOrder
from tests.local.rank_runs import continued, fine_tuned, merged, plan_of, run_directory, run_ranks
from tests.local.test_losses import PEAK, UPDATES, WARMUP, evaluated, zero_config

pytestmark = pytest.mark.local

BATCH = 4


def packing_job(job_dict: dict, **sections: dict) -> dict:
    """Bins of 128 tokens, each with several of the conversations."""
    job = merged(
        job_dict,
        data={"packing": True, "max_length": 128},
        train={"max_steps": UPDATES, "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": 1},
        schedule={"peak_lr": PEAK, "warmup": WARMUP, "allow_unsafe": True},
    )
    return merged(job, **sections)


def store_of(plan: Plan) -> TokenStore:
    return TokenStore(Path(plan.training.data.train.folder))


def plain_loop(plan: Plan) -> dict[str, list[float]]:
    """Losses and gradient norms of a loop that computes the sequences of each update one by one, in float32."""
    store = store_of(plan)
    model = AutoModelForCausalLM.from_pretrained(plan.training.model.folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    order = BinOrder(np.diff(store.offsets), plan.training.job.data.max_length, plan.job.train.seed)
    held_out = TokenStore(Path(plan.training.data.eval.folder))
    found = {"loss": [], "grad_norm": [], "eval": [evaluated(model, held_out)]}
    for update in range(UPDATES):
        low, down = PEAK / (WARMUP + 1), (UPDATES - update) / (UPDATES - WARMUP)
        lr = PEAK * (update + 1) / (WARMUP + 1) if update <= WARMUP else low + (PEAK - low) * down
        optimizer.param_groups[0]["lr"] = lr
        total, count = 0.0, 0
        for sequence in np.concatenate(order.take(update * BATCH, (update + 1) * BATCH)):
            ids, learned = (torch.from_numpy(np.array(part, dtype=np.int64)) for part in store[int(sequence)])
            losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total = total + (losses * learned[1:]).sum()
            count += int(learned[1:].sum())
        optimizer.zero_grad()
        (total / count).backward()
        found["grad_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        found["loss"].append((total / count).item())
    found["eval"].append(evaluated(model, held_out))
    return found


def assert_updates(run: RunDir, plain: dict[str, list[float]]) -> None:
    lines = run.metrics()
    assert [line["samples"] for line in lines] == [BATCH * (update + 1) for update in range(UPDATES)]
    np.testing.assert_allclose([line["loss"] for line in lines], plain["loss"], rtol=2e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], plain["grad_norm"], rtol=2e-4)
    np.testing.assert_allclose([line["loss"] for line in run.evaluations()], plain["eval"], rtol=2e-5)


@pytest.mark.parametrize(
    ("stage", "micro_batch", "model"),
    [(0, 2, {}), (1, 1, {}), (2, 2, {"chunked_loss": False}), (3, 1, {"gradient_checkpointing": True})],
)
def test_zero_stages_make_the_updates_of_single_sequences(stage, micro_batch, model, job_dict, tmp_path):
    job = packing_job(job_dict, model=model, deepspeed=zero_config(stage))
    plan = plan_of(merged(job, train={"train_micro_batch_size_per_gpu": micro_batch}))
    assert plan.gradient_accumulation_steps == 2 // micro_batch
    assert plan.training.chunked_loss == model.get("chunked_loss", True)
    train = plan.training.data.train
    assert train.sequences >= 2 * train.bins
    run = fine_tuned(plan, tmp_path)
    assert_updates(run, plain_loop(plan))
    exported = AutoModelForCausalLM.from_pretrained(run.export)
    assert exported.config._attn_implementation == "sdpa"
    assert "launcher" not in (run.export / "config.json").read_text()


def test_adapters_on_packed_sequences_make_the_updates_of_padded_ones(job_dict, tmp_path):
    """One update has all sequences, so packing does not change which they are."""
    losses = {}
    for name, packing in (("packed", True), ("padded", False)):
        job = packing_job(
            job_dict, model={"lora": {"r": 4}}, data={"packing": packing}, cluster={"processes_per_node": 1}
        )
        sizes = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "max_steps": 3}
        facts = plan_of(merged(job, train=sizes)).training.data.train
        batch = facts.bins if packing else facts.sequences
        plan = plan_of(merged(job, train={**sizes, "train_batch_size": batch, "train_micro_batch_size_per_gpu": batch}))
        losses[name] = [line["loss"] for line in fine_tuned(plan, tmp_path / name).metrics()]
    np.testing.assert_allclose(losses["packed"], losses["padded"], rtol=2e-5)
    assert losses["packed"][-1] < losses["packed"][0]


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_resume_makes_the_updates_of_an_uninterrupted_run(ranks, job_dict, tmp_path):
    """The checkpoint is in the middle of an epoch, on two ranks; the run resumes on two or one."""
    job = packing_job(job_dict, deepspeed=zero_config(2), export=False)
    plan = plan_of(job)
    whole = fine_tuned(plan, tmp_path / "whole")
    run = run_directory(plan, tmp_path / "cut")
    run_ranks(plan, run, stop_at=3)
    samples = run.metrics()[-1]["samples"]
    assert 4 * BATCH <= samples < UPDATES * BATCH and samples % plan.training.data.train.bins != 0
    rest, _ = continued(run, f"cluster.processes_per_node={ranks}")
    assert (rest.plan.world.size, rest.plan.train_batch_size) == (ranks, BATCH)
    found, expected = run.metrics(), whole.metrics()
    for key in ("update", "samples", "tokens", "lr"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    losses = ([line["loss"] for line in lines] for lines in (found, expected))
    np.testing.assert_allclose(*losses, rtol=0 if ranks == 2 else 5e-5)


def test_grouping_by_length_makes_the_same_updates(job_dict, tmp_path):
    """Two ranks with four micro-batches of two sequences each."""
    runs = {}
    for grouped in (False, True):
        sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
        job = packing_job(job_dict, data={"packing": False, "group_by_length": grouped}, train=sizes, export=False)
        runs[grouped] = fine_tuned(plan_of(merged(job, deepspeed=zero_config(1))), tmp_path / str(grouped)).metrics()
    for key in ("update", "samples", "tokens", "lr"):
        assert [line[key] for line in runs[True]] == [line[key] for line in runs[False]]
    found, expected = ([line["loss"] for line in runs[grouped]] for grouped in (True, False))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert found != expected, "the micro-batches are the same"


def test_packed_sequences_in_bfloat16(job_dict, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        plan = plan_of(packing_job(job_dict, model={"dtype": dtype}, deepspeed=zero_config(3), export=False))
        losses[dtype] = [line["loss"] for line in fine_tuned(plan, tmp_path / dtype).metrics()]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=2e-2)

"""Private names of DeepSpeed that are gone stop a run; docs/compatibility.md lists them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.errors import RunFailed
from launcher.plan.schema import Plan
from launcher.worker import scheduler
from launcher.worker.checkpoint import _group_settings, _restore_settings
from launcher.worker.gradient_norm import norm_before_step, norm_of_step
from launcher.worker.lr_check import InStep, OutOfStep
from launcher.worker.model import load_model, make_engine, parameter_groups
from launcher.worker.ranks import Ranks
from tests.local.rank_runs import merged, plan_of
from tests.local.test_losses import zero_config

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_process")]


def an_engine(job_dict: dict, **sections: Any) -> tuple[Plan, Any]:
    """The plan of one rank and its engine, with gradients for one update."""
    alone = merged(job_dict, cluster={"processes_per_node": 1}, train={"train_batch_size": 4})
    plan = plan_of(merged(alone, **sections))
    engine = make_engine(plan, load_model(plan))
    scheduler.begin(engine, plan)
    tokens = torch.arange(8).reshape(1, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    return plan, engine


def test_the_norm_is_deepspeeds_and_a_lost_one_stops_the_run(job_dict, monkeypatch):
    plan, engine = an_engine(job_dict, deepspeed=zero_config(2))
    assert norm_before_step(engine, plan) is None
    engine.step()
    found = norm_of_step(engine, plan)
    plain_plan, plain = an_engine(job_dict, deepspeed=zero_config(0))
    assert found == pytest.approx(norm_before_step(plain, plain_plan), rel=1e-4)

    # As if DeepSpeed had renamed it: the attribute is deleted, and no step sets it.
    kind, name = type(engine.optimizer), "_global_grad_norm"
    delattr(engine.optimizer, name)
    keep = kind.__setattr__
    monkeypatch.setattr(kind, "__setattr__", lambda self, key, value: key == name or keep(self, key, value))
    engine._global_grad_norm = None
    tokens = torch.arange(8).reshape(1, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    assert norm_before_step(engine, plan) is None
    engine.step()
    with pytest.raises(RunFailed, match="reports no gradient norm"):
        norm_of_step(engine, plan)


def test_a_norm_that_the_json_switches_off_is_none(job_dict):
    config = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}, "gradient_clipping": 0.0}
    plan, engine = an_engine(job_dict, deepspeed=config, train={"train_batch_size": 4, "gradient_clipping": 0.0})
    engine.step()
    assert norm_of_step(engine, plan) is None


def test_a_resume_has_the_plans_settings_and_not_the_checkpoints(job_dict, tmp_path):
    config = {**zero_config(2), "gradient_clipping": 0.25}
    train = {"weight_decay": 0.2, "betas": [0.7, 0.9]}
    _, saved = an_engine(job_dict, deepspeed=config, train={**train, "train_batch_size": 4})
    saved.step()
    saved.save_checkpoint(tmp_path, tag="one")
    config = {**zero_config(2), "gradient_clipping": 0.5}
    _, engine = an_engine(job_dict, deepspeed=config, train={"weight_decay": 0.1, "train_batch_size": 4})
    engine.step()
    settings = _group_settings(engine)
    engine.load_checkpoint(tmp_path, tag="one")
    assert engine.optimizer.clip_grad == 0.25
    _restore_settings(engine, settings)
    assert engine.optimizer.clip_grad == 0.5
    groups = engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.999)] * 2
    del engine.optimizer.clip_grad
    with pytest.raises(RunFailed, match="has no clip_grad"):
        _restore_settings(engine, settings)


def test_a_partitioned_weight_without_its_shape_is_neither_matrix_nor_vector(job_dict):
    plan = plan_of(merged(job_dict, cluster={"processes_per_node": 1}, deepspeed=zero_config(3)))
    model = load_model(plan)
    assert [len(group["params"]) for group in parameter_groups(model)] == [15, 5]
    for parameter in model.parameters():
        del parameter.ds_shape
    with pytest.raises(RunFailed, match="does not name the shape"):
        parameter_groups(model)


def test_the_group_that_leaves_the_plan_is_named(job_dict):
    plan, engine = an_engine(job_dict, deepspeed=zero_config(1))
    here = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), host="here")
    in_step = InStep(here, plan, ["here"])
    rate = in_step.check(engine, 0)
    engine.optimizer.param_groups[1]["lr"] = rate / 2
    with pytest.raises(OutOfStep) as stopped:
        in_step.check(engine, 0)
    assert f"learning rate of {rate / 2!r} in parameter group 1 of 2; the plan says {rate!r}" in str(stopped.value)

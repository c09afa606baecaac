"""The plan with which a checkpoint is exported: whole, on a CPU, with the options of the request."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.export_folder import ExportRequest
from launcher.job.schema import LoraSection
from launcher.plan.schema import Plan
from launcher.worker.exporter import unsharded_plan
from tests.unit.inputs import job_of, plan_of


def gpu_plan() -> Plan:
    """A plan with adapters, and with options that only GPUs have."""
    plan = plan_of(job_of(deepspeed="zero3"))
    changes = {"attn_implementation": "flash_attention_2", "liger": True, "gradient_checkpointing": True}
    section = plan.training.job.model.model_copy(update={**changes, "lora": LoraSection(r=4)})
    job = plan.training.job.model_copy(update={"model": section})
    return plan.model_copy(update={"workload": plan.training.model_copy(update={"job": job})})


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_is_exported_without_options_that_need_a_gpu(merge: bool) -> None:
    request = ExportRequest(
        plan_file=Path("plan"), checkpoint=Path("c"), folder=Path("f"), dtype="float32", merge=merge
    )
    plan = unsharded_plan(gpu_plan(), request)
    section = plan.training.job.model
    assert (section.attn_implementation, section.liger, section.gradient_checkpointing) == ("auto", False, False)
    assert section.lora is not None and (section.lora.r, section.lora.merge) == (4, merge)
    assert (plan.precision, plan.zero_stage) == ("fp32", 0)

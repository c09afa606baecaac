"""A transformers template and `deepspeed: auto`, carried out by real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.local.rank_runs import fine_tuned, merged, plan_of

pytestmark = pytest.mark.local

TEMPLATE: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_a_template_runs_at_the_generated_rates_as_the_chosen_preset_does(job_dict: dict, tmp_path: Path) -> None:
    """The template leaves the schedule open, and asks for no gathering when saving: the export gathers by itself."""
    job = merged(job_dict, schedule={"shape": "auto", "peak_lr": 1e-3, "warmup": 1})
    template = plan_of({**job, "deepspeed": TEMPLATE})
    chosen = plan_of({**merged(job, schedule={"shape": "linear"}), "deepspeed": "auto"})
    assert chosen.recommendation is not None
    assert chosen.recommendation.preset == "zero1"
    assert chosen.warnings[0].startswith("deepspeed: auto takes zero1: it fits")

    first, second = fine_tuned(template, tmp_path / "template"), fine_tuned(chosen, tmp_path / "chosen")
    assert template.ds_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is False
    rates = [[line["lr"] for line in run.metrics()] for run in (first, second)]
    np.testing.assert_allclose(rates[0], rates[1], rtol=1e-12)
    assert max(rates[0]) == pytest.approx(1e-3)
    losses = [[line["loss"] for line in run.metrics()] for run in (first, second)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert (first.export / "model.safetensors").stat().st_size == (second.export / "model.safetensors").stat().st_size

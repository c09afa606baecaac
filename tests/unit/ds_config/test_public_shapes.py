"""JSONs as real projects write them: lint finds nothing to fix, and the plan keeps their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from launcher.ds_config import parse_ds_config
from launcher.ds_config.catalogue import load_catalogue
from launcher.ds_config.lint import lint
from launcher.ds_config.target import Target
from launcher.plan.inputs import plan_inputs
from launcher.plan.learning_rate import planned_lrs
from launcher.plan.resolve import check_inputs, resolve
from tests.unit.ds_config.public_shapes import TEMPLATES
from tests.unit.inputs import data_facts, job_of, machine_facts, model_facts

JOB = job_of(train={"max_steps": 100})


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_lints_clean_and_can_be_planned(name: str) -> None:
    user = parse_ds_config(TEMPLATES[name], "ds.json")
    found = lint(user, Target("cuda", 8), load_catalogue())
    assert [one for one in found if one.severity != "note"] == []

    inputs = plan_inputs(JOB, user, machine_facts(8))
    check_inputs(inputs)
    plan = resolve(inputs, model_facts(), data_facts())
    made = dict(leaves(plan.ds_config))
    assert not [path for path, value in made.items() if "auto" in (value if isinstance(value, list) else [value])]
    assert (made["bf16.enabled"], made.get("fp16.enabled", False)) == (True, False)
    assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 8
    changed = {change.key for change in plan.ds_config_changes}
    for path, value in leaves(user.data):
        kept = made.get(path) is value or made.get(path) == value
        assert kept or any(path == key or path.startswith(f"{key}.") for key in changed), path

    lr_at = planned_lrs(plan)
    lrs = [lr_at(update) for update in range(100)]
    highest = lrs.index(max(lrs))
    assert made["scheduler.params.warmup_type"] == "linear"
    assert max(lrs) == pytest.approx(plan.learning_rate.peak_lr)
    assert lrs[: highest + 1] == sorted(lrs[: highest + 1])
    assert lrs[highest:].count(0.0) == 0

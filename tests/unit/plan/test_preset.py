"""`deepspeed: auto`: the first preset that fits, reported with the numbers of all candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RequestError
from launcher.plan.inputs import plan_inputs
from launcher.plan.preset import PRESETS_IN_ORDER, recommend
from launcher.plan.schema import Recommendation
from tests.unit.inputs import (
    GIB,
    command,
    data_facts,
    job_of,
    machine_facts,
    model_facts,
    preset,
    remember,
    write_folder,
)

BILLION = 1_000_000_000


def chosen(
    parameters: int, gpus: int = 8, gpu_gib: int = 80, kept: str | None = None, **sections: Any
) -> Recommendation:
    presets = {name: preset(name) for name in PRESETS_IN_ORDER}
    machine = machine_facts(gpus, gpu_gib=gpu_gib)
    model = model_facts(parameters=parameters)
    inputs = plan_inputs(job_of(**sections), presets["zero1"], machine)
    return recommend(inputs, presets, model, data_facts(), kept=kept)


@pytest.mark.parametrize(
    ("parameters", "gpu_gib", "name"),
    [
        (BILLION, 80, "zero1"),
        (13 * BILLION, 80, "zero2"),
        (30 * BILLION, 80, "zero3"),
        (8 * BILLION, 16, "zero3_cpu_offload"),
    ],
)
def test_the_first_preset_that_fits_is_chosen(parameters: int, gpu_gib: int, name: str) -> None:
    found = chosen(parameters, gpu_gib=gpu_gib)
    assert found.preset == name
    verdicts = {one.preset: one.fits for one in found.candidates}
    assert list(verdicts) == list(PRESETS_IN_ORDER)
    assert not any(
        fits for other, fits in verdicts.items() if PRESETS_IN_ORDER.index(other) < PRESETS_IN_ORDER.index(name)
    )
    assert verdicts[name]
    assert found.device_room == int(0.9 * gpu_gib * GIB)
    sizes = [one.device_bytes for one in found.candidates]
    assert sizes[-1] == min(sizes)
    assert ("would not fit" in found.reason) is (name != "zero1")


def test_if_no_preset_fits_the_error_has_the_numbers_and_a_hint() -> None:
    with pytest.raises(RequestError) as caught:
        chosen(200 * BILLION, gpus=1, gpu_gib=24)
    (problem,) = caught.value.problems
    assert problem.key == "deepspeed"
    assert "no preset fits in 21.6 GiB of a GPU and 921.6 GiB of a node's host memory" in problem.message
    assert all(f"{name} needs" in problem.message for name in PRESETS_IN_ORDER)
    assert "model.gradient_checkpointing: true" in str(problem.hint)
    assert "zero3_nvme_offload" in str(problem.hint)


def test_on_a_cpu_offload_is_not_a_candidate_and_the_host_is_shared() -> None:
    found = chosen(BILLION, gpus=0, cluster={"processes_per_node": 2})
    assert [one.preset for one in found.candidates] == ["zero1", "zero2", "zero3"]
    first = found.candidates[0]
    assert first.host_bytes == 2 * first.device_bytes
    assert found.device_room == found.host_room // 2


def test_the_reason_says_that_no_gpu_is_visible() -> None:
    found = chosen(BILLION, gpus=0, cluster={"gpus_per_node": 8})
    assert (found.preset, found.device_room) == ("zero2", None)
    assert "no GPU is visible here" in found.reason
    assert {(one.micro_batch, one.fits) for one in found.candidates} == {(1, True)}


def test_a_resumed_run_keeps_its_preset() -> None:
    assert chosen(BILLION, kept="zero3").preset == "zero3"


def test_plan_shows_the_candidates_and_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_folder(tmp_path)
    with Path("job.yaml").open("a") as job:
        job.write("deepspeed: auto\n")
    small = model_facts(parameters=1_000_000, hidden_size=64, intermediate_size=128, layers=2, vocab_size=100)
    remember(Path("job.yaml"), (), small, data_facts())

    ended = command("plan", "job.yaml")
    assert ended.status == 0, ended.err
    assert "deepspeed: auto  chose zero1: it fits" in ended.out
    rows = [line.split() for line in ended.out.splitlines() if line.strip().startswith("zero")]
    assert [(row[0], row[-1]) for row in rows] == [("zero1", "chosen"), ("zero2", "fits"), ("zero3", "fits")]
    assert '"preset": "zero1"' in command("plan", "--json", "job.yaml").out

    remember(Path("job.yaml"), (), model_facts(parameters=10**13), data_facts())
    ended = command("plan", "job.yaml")
    assert ended.status == 2
    assert "job.yaml:4: deepspeed: no preset fits in" in ended.err

"""`deepspeed: auto`: the first preset that fits, according to the memory estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.ds_config import DsConfig
from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.fit import GIB, MemoryLimits, MemoryNeeds, memory_limits
from launcher.plan.inputs import PlanInputs
from launcher.plan.resolve import longest_row, training_batch
from launcher.plan.schema import Candidate, Recommendation, World

PRESETS_IN_ORDER = ("zero1", "zero2", "zero3", "zero3_cpu_offload")
"""Each communicates more than the one before it. The other presets need something that only the user knows: a folder on
NVMe, or whether the network between nodes is slow."""
WITHOUT_VISIBLE_GPU = "zero2"
"""The preset if no GPU is visible here."""


@dataclass(frozen=True)
class _Evaluated:
    candidate: Candidate
    needs: MemoryNeeds


def recommend(
    inputs: PlanInputs[Job],
    presets: Mapping[str, DsConfig],
    model: ModelFacts,
    data: DataFacts,
    *,
    kept: str | None = None,
) -> Recommendation:
    """The preset for a job, with the numbers of all candidates. `presets` contains those of PRESETS_IN_ORDER.

    `kept` is the preset of a resumed run, which its checkpoints require. Raises RequestError if no preset fits.
    """
    world, limits = inputs.world, memory_limits(inputs.world, inputs.machine)
    evaluated = [
        _evaluate(
            name, MemoryNeeds(inputs.with_ds_config(presets[name]), model, longest_row(inputs.job, data)), data, limits
        )
        for name in _candidates(world)
    ]
    candidates = tuple(one.candidate for one in evaluated)
    if kept is not None:
        return _recommended(kept, "the run started with it", limits, candidates)
    if limits.device is None:
        reason = "no GPU is visible here, so its memory is unknown: name a preset if you need another"
        return _recommended(WITHOUT_VISIBLE_GPU, reason, limits, candidates)
    for candidate in candidates:
        if candidate.fits:
            return _recommended(candidate.preset, _why(candidate, candidates, world, limits), limits, candidates)
    raise RequestError(_nothing_fits(evaluated, world, limits))


def _candidates(world: World) -> Iterator[str]:
    """On a CPU the host is the device, so offloading frees nothing."""
    return (name for name in PRESETS_IN_ORDER if world.device == "cuda" or not name.endswith("offload"))


def _evaluate(name: str, needs: MemoryNeeds, data: DataFacts, limits: MemoryLimits) -> _Evaluated:
    """A preset with the micro-batch that the plan would use with it."""
    micro = training_batch(needs, data).train_micro_batch_size_per_gpu
    candidate = Candidate(
        preset=name,
        micro_batch=micro,
        device_bytes=needs.estimate(micro).device_total,
        host_bytes=needs.host_bytes(micro),
        # Unknown memory rules out no preset.
        fits=limits.device is None or limits.allow(needs, micro),
    )
    return _Evaluated(candidate, needs)


def _recommended(preset: str, reason: str, limits: MemoryLimits, candidates: tuple[Candidate, ...]) -> Recommendation:
    return Recommendation(
        preset=preset, reason=reason, device_room=limits.device, host_room=limits.host, candidates=candidates
    )


def _why(chosen: Candidate, candidates: tuple[Candidate, ...], world: World, limits: MemoryLimits) -> str:
    assert limits.device is not None
    too_large = [one.preset for one in candidates[: candidates.index(chosen)]]
    what = "the first that fits" if too_large else "it fits, and the others communicate more"
    needs = f"about {chosen.device_bytes / GIB:.1f} of {limits.device / GIB:.1f} GiB {_device(world)}"
    return f"{what}: {needs}" + (f"; {', '.join(too_large)} would not fit" if too_large else "")


def _device(world: World) -> str:
    return "of a GPU" if world.device == "cuda" else "per process"


def _nothing_fits(evaluated: list[_Evaluated], world: World, limits: MemoryLimits) -> Problem:
    assert limits.device is not None
    needs = "; ".join(_need(one.candidate, world) for one in evaluated)
    available = f"{limits.device / GIB:.1f} GiB {_device(world)}"
    if world.device == "cuda":
        available += f" and {limits.host / GIB:.1f} GiB of a node's host memory"
    return Problem(
        f"no preset fits in {available}: {needs}",
        key="deepspeed",
        hint="use " + ", ".join(_savings(evaluated[-1], world)),
    )


def _need(candidate: Candidate, world: World) -> str:
    host = f" and {candidate.host_bytes / GIB:.1f} GiB of host memory" if world.device == "cuda" else ""
    return (
        f"{candidate.preset} needs {candidate.device_bytes / GIB:.1f} GiB{host} at micro-batch {candidate.micro_batch}"
    )


def _savings(last: _Evaluated, world: World) -> Iterator[str]:
    """Settings that reduce memory and are not in use yet, the cheapest first."""
    job, model = last.needs.inputs.job, last.needs.model
    if last.candidate.micro_batch > 1:
        yield "a smaller train.train_micro_batch_size_per_gpu"
    if not job.model.gradient_checkpointing and model.supports_gradient_checkpointing:
        yield "model.gradient_checkpointing: true"
    yield f"data.max_length below {last.needs.longest}"
    if job.model.lora is None:
        yield "model.lora"
    yield "more nodes"
    if world.device == "cuda":
        yield "or zero3_nvme_offload, edited for your disks"
    else:
        yield "or fewer processes per node"

"""`deepspeed: auto`: the first preset that fits, by the memory estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.ds_config import DsConfig
from launcher.errors import Problem, RequestError
from launcher.job import Job
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.fit import GIB, Needs, Room, room_of
from launcher.plan.inputs import PlanInputs
from launcher.plan.resolve import longest_sequence, training_batch
from launcher.plan.schema import Candidate, Recommendation, World

IN_ORDER = ("zero1", "zero2", "zero3", "zero3_cpu_offload")
"""Each communicates more than the one before it. The others need something that only the user knows: a folder on NVMe,
and whether the network between nodes is slow."""
UNSEEN = "zero2"
"""Taken where no GPU's memory is seen from here."""


@dataclass(frozen=True)
class _Weighed:
    candidate: Candidate
    needs: Needs


def recommend(
    inputs: PlanInputs[Job],
    presets: Mapping[str, DsConfig],
    model: ModelFacts,
    data: DataFacts,
    *,
    kept: str | None = None,
) -> Recommendation:
    """The preset for a job, with the numbers of all that were weighed. `presets` holds those of IN_ORDER.

    A run that goes on has a preset to be `kept`: its checkpoints are of that stage. Raises RequestError where nothing
    fits.
    """
    world, room = inputs.world, room_of(inputs.world, inputs.machine)
    weighed = [
        _weigh(name, Needs(inputs.with_ds_config(presets[name]), model, longest_sequence(data)), data, room)
        for name in _weighable(world)
    ]
    candidates = tuple(one.candidate for one in weighed)
    if kept is not None:
        return _recommended(kept, "the run began with it", room, candidates)
    if room.device is None:
        reason = "no GPU is seen from here, so that its memory is not known: name a preset where another is needed"
        return _recommended(UNSEEN, reason, room, candidates)
    for candidate in candidates:
        if candidate.fits:
            return _recommended(candidate.preset, _why(candidate, candidates, world, room), room, candidates)
    raise RequestError(_nothing_fits(weighed, world, room))


def _weighable(world: World) -> Iterator[str]:
    """On a CPU the host is the device: moving states there frees nothing."""
    return (name for name in IN_ORDER if world.device == "cuda" or not name.endswith("offload"))


def _weigh(name: str, needs: Needs, data: DataFacts, room: Room) -> _Weighed:
    """A preset with the micro-batch that the plan would take under it."""
    micro = training_batch(needs, data).train_micro_batch_size_per_gpu
    candidate = Candidate(
        preset=name,
        micro_batch=micro,
        device_bytes=needs.estimate(micro).device_total,
        host_bytes=needs.host_bytes(micro),
        # Nothing is refused on account of a memory that is not seen.
        fits=room.device is None or room.holds(needs, micro),
    )
    return _Weighed(candidate, needs)


def _recommended(preset: str, reason: str, room: Room, candidates: tuple[Candidate, ...]) -> Recommendation:
    return Recommendation(
        preset=preset, reason=reason, device_room=room.device, host_room=room.host, candidates=candidates
    )


def _why(chosen: Candidate, candidates: tuple[Candidate, ...], world: World, room: Room) -> str:
    assert room.device is not None
    passed = [one.preset for one in candidates[: candidates.index(chosen)]]
    what = "the first that fits" if passed else "it fits, and the others communicate more"
    needs = f"about {chosen.device_bytes / GIB:.1f} of {room.device / GIB:.1f} GiB {_place(world)}"
    return f"{what}: {needs}" + (f"; {', '.join(passed)} would not fit" if passed else "")


def _place(world: World) -> str:
    return "of a GPU" if world.device == "cuda" else "of a process's share"


def _nothing_fits(weighed: list[_Weighed], world: World, room: Room) -> Problem:
    assert room.device is not None
    needs = "; ".join(_need(one.candidate, world) for one in weighed)
    there = f"{room.device / GIB:.1f} GiB {_place(world)}"
    if world.device == "cuda":
        there += f", {room.host / GIB:.1f} GiB of a node's host memory"
    return Problem(
        f"no preset fits into {there}: {needs}", key="deepspeed", hint="take " + ", ".join(_turn(weighed[-1], world))
    )


def _need(candidate: Candidate, world: World) -> str:
    host = f" and {candidate.host_bytes / GIB:.1f} of the host's" if world.device == "cuda" else ""
    return f"{candidate.preset} needs {candidate.device_bytes / GIB:.1f}{host} at micro-batch {candidate.micro_batch}"


def _turn(last: _Weighed, world: World) -> Iterator[str]:
    """What makes a job smaller, as far as it is not done yet, the cheapest first."""
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
        yield "or fewer processes a node"

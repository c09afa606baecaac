"""The learning rate of a plan: advised where the job leaves it open, checked, and as DeepSpeed's JSON blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.ds_config import DsConfig, auto_scheduler, has_auto_warmup, optimizer_of, scheduler_of
from launcher.errors import Problem, RequestError
from launcher.job import AnyJob, Job
from launcher.plan.facts import DataFacts, ModelFacts
from launcher.plan.inputs import J, PlanInputs
from launcher.plan.revision import schedule_of
from launcher.plan.schema import LearningRate, Length, Plan, Reason
from launcher.schedule.advice import Choice, Situation, advise, parse_warmup
from launcher.schedule.curve import DEEPSPEED_TYPES, Schedule, deepspeed_blocks, lr_at, make_schedule
from launcher.schedule.deepspeed_schedulers import Params, replica
from launcher.schedule.safety import ALLOW, check_safety, deepspeed_warnings, log_ramp, unsafe_scheduler

_OPTIONS = ("decay_at", "decay_factor", "decay_start", "decay", "cycles", "segments")


_SHAPES = {kind: shape for shape, kind in DEEPSPEED_TYPES.items()}

NO_METHOD = "unknown"
"""Of which the safety rules know no highest peak."""


@dataclass(frozen=True)
class Decided:
    """The rate for the plan, and the blocks of the DeepSpeed JSON that carry it."""

    learning_rate: LearningRate
    scheduler: dict[str, Any] | None
    optimizer_lr: float


def decide_lr(inputs: PlanInputs[Job], model: ModelFacts, data: DataFacts, length: Length) -> Decided:
    """The scheduler of the user's own JSON where it has one and the job asks for none, else a generated schedule.

    Raises RequestError for a schedule that makes no curve, or that is not safe without the user's word.
    """
    job = inputs.job
    situation = Situation(
        parameters=model.parameters,
        method="full" if job.model.lora is None else "lora",
        tokens_per_update=length.tokens_per_update,
        total_updates=length.total_updates,
        dataset_samples=data.train.sequences,
        beta2=job.train.betas[1],
        task=job.schedule.task,
    )
    return kept_or_generated(inputs, situation)


def kept_or_generated(inputs: PlanInputs[J], situation: Situation, *, limited: bool = True) -> Decided:
    """The whole scheduler of the user's JSON, or a generated one where it has none or the job names a shape.

    A scheduler that leaves all its params to "auto" is generated, in the shape of its type; a few are filled in.
    `limited`: whether the peak is held to what is published for the situation's method and size. Raises RequestError.
    """
    job, user = inputs.job, inputs.ds_config
    written, lr = scheduler_of(user), (optimizer_of(user) or {}).get("params", {}).get("lr")
    asked = "schedule.shape" in inputs.explicit
    shape = None if asked else _SHAPES.get(auto_scheduler(user) or "")
    if written is None or asked or shape:
        try:
            return generate(job, situation, lr, shape, limited=limited)
        except RequestError as error:
            raise RequestError(*(_of_peak(problem, job, user, lr) for problem in error.problems)) from None
    return _written(inputs, _filled(job, written, user, situation, lr), situation, limited)


def _of_peak(problem: Problem, job: AnyJob, user: DsConfig, lr: float | None) -> Problem:
    """A problem of a peak that the JSON's optimizer names, at its place there."""
    if problem.key != "schedule.peak_lr" or job.schedule.peak_lr != "auto" or lr is None:
        return problem
    return user.problem("optimizer.params.lr", problem.message, problem.hint)


def _filled(
    job: AnyJob, written: dict[str, Any], user: DsConfig, situation: Situation, lr: float | None
) -> dict[str, Any]:
    """The user's scheduler with a value for each "auto" that the plan can fill."""
    raw = user.get("scheduler.params")
    autos = [name for name, value in (raw if isinstance(raw, dict) else {}).items() if value == "auto"]
    if not autos:
        return written
    chosen = _choose(job, situation, lr, _SHAPES.get(written["type"]))
    known = {
        "total_num_steps": situation.total_updates,
        "warmup_num_steps": chosen["warmup"].value,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": chosen["peak_lr"].value,
        "warmup_min_ratio": 0.0,
        "cos_min_ratio": chosen["floor"].value,
        "warmup_type": "linear",
        "last_batch_iteration": -1,
    }
    filled = {name: known[name] for name in autos if name in known}
    gentle = {"warmup_type": "linear"} if has_auto_warmup(user) else {}
    return {**written, "params": {**written["params"], **filled, **gentle}}


def generate(
    job: AnyJob,
    situation: Situation,
    written_lr: float | None = None,
    written_shape: str | None = None,
    *,
    limited: bool = True,
) -> Decided:
    """The generated schedule of `job`: what it says, and advice for the rest.

    `written_lr` is the optimizer's rate in the user's JSON, taken as the peak where the job names none; `written_shape`
    likewise the shape of the JSON's scheduler.
    """
    asked = job.schedule
    chosen = _choose(job, situation, written_lr, written_shape)
    options = {
        name: [segment.model_dump() for segment in value] if name == "segments" else value
        for name in _OPTIONS
        if (value := getattr(asked, name)) is not None
    }
    follows = asked.floor == "auto" and chosen["shape"].value in ("linear", "constant", "step", "compound")
    floor = None if follows else chosen["floor"].value
    schedule = make_schedule(
        chosen["shape"].value,
        peak_lr=chosen["peak_lr"].value,
        warmup_updates=chosen["warmup"].value,
        total_updates=situation.total_updates,
        floor=floor,
        warmup_type=asked.warmup_type,
        **options,
    )
    method = situation.method if limited else NO_METHOD
    problems = check_safety(schedule, method=method, parameters=situation.parameters)
    if problems and not asked.allow_unsafe:
        raise RequestError(*problems)
    if situation.method != "full":
        reason = "Adapters are trained, so rates are advised, and held to be safe, as published for them."
        chosen = {"method": _said(situation.method, reason), **chosen}
    if ramp := log_ramp(schedule):
        chosen["warmup_type"] = _said("log", ramp)
    return Decided(_described(schedule, chosen), deepspeed_blocks(schedule)["scheduler"], schedule.peak_lr)


def planned_rates(plan: Plan) -> Callable[[int], float]:
    """The rate that the plan gives the update of each number (from 0; skipped ones do not count)."""
    if plan.learning_rate.schedule is None or not plan.learning_rate.advance:
        scheduler, optimizer = plan.ds_config["scheduler"], plan.ds_config["optimizer"]
        return replica(scheduler["type"], scheduler["params"], optimizer["params"]["lr"]).lr_after
    schedule = schedule_of(plan)
    return lambda update: lr_at(schedule, update)


def _choose(
    job: AnyJob, situation: Situation, written_lr: float | None, written_shape: str | None = None
) -> dict[str, Choice]:
    """The user's word where there is one, else the advice that follows from it, by name."""
    asked = job.schedule
    said: dict[str, Choice] = {}
    if asked.peak_lr != "auto":
        said["peak_lr"] = _said(asked.peak_lr, f"schedule.peak_lr in the job is {asked.peak_lr:g}.")
    elif written_lr is not None:
        said["peak_lr"] = _said(written_lr, f"The optimizer's rate in the DeepSpeed JSON is {written_lr:g}.")
    if asked.warmup != "auto":
        updates = parse_warmup(asked.warmup, situation.total_updates, situation.tokens_per_update)
        said["warmup"] = _said(updates, f"schedule.warmup in the job is {asked.warmup}.")
    if asked.shape != "auto":
        said["shape"] = _said(asked.shape, f"schedule.shape in the job is {asked.shape}.")
    elif written_shape is not None:
        kind = DEEPSPEED_TYPES[written_shape]
        said["shape"] = _said(written_shape, f"The DeepSpeed JSON's scheduler is a {kind}, and leaves the rest open.")
    if asked.floor != "auto":
        said["floor"] = _said(asked.floor, f"schedule.floor in the job is {asked.floor:g} of the peak.")
    advice = advise(
        situation,
        shape=said["shape"].value if "shape" in said else None,
        warmup_updates=said["warmup"].value if "warmup" in said else None,
    )
    advised = {
        "peak_lr": advice.peak_lr,
        "warmup": advice.warmup_updates,
        "shape": advice.shape,
        "floor": advice.floor,
    }
    return {**advised, **said}


def _said(value: Any, reason: str) -> Choice:
    return Choice(value, None, None, reason, (), heuristic=False)


def _described(schedule: Schedule, chosen: dict[str, Choice]) -> LearningRate:
    return LearningRate(
        schedule=schedule.to_dict(),
        advance=1,
        shape=schedule.shape,
        peak_lr=schedule.peak_lr,
        floor_lr=schedule.floor_lr,
        warmup_updates=schedule.warmup_updates,
        reasons=tuple(_reason(name, choice) for name, choice in chosen.items()),
    )


def _reason(name: str, choice: Choice) -> Reason:
    return Reason(
        choice=name,
        value=choice.value,
        low=choice.low,
        high=choice.high,
        reason=choice.reason,
        sources=choice.sources,
        heuristic=choice.heuristic,
    )


def _written(inputs: PlanInputs[J], scheduler: dict[str, Any], situation: Situation, limited: bool) -> Decided:
    """The user's own scheduler, as DeepSpeed will drive it. Raises RequestError where it needs the user's word."""
    job, user = inputs.job, inputs.ds_config
    kind, params = scheduler["type"], scheduler["params"]
    updates, method = situation.total_updates, situation.method if limited else NO_METHOD
    refuse_unused(inputs, kind, params)
    _refuse_other_length(inputs, params, updates)
    lr, advised = _written_lr(job, scheduler, user), None
    if lr is None:
        advised = _advised_peak(job, kind, user, situation, limited)
        lr = float(advised.value)
    curve = replica(kind, params, lr)
    rates = [curve.lr_after(update) for update in range(updates)]
    problems = unsafe_scheduler(kind, params, lr, updates, method=method, parameters=situation.parameters)
    problems = [*(_in_json(problem, user) for problem in problems), *_idle(params, rates, user)]
    if problems and not job.schedule.allow_unsafe:
        raise RequestError(*problems)
    peak = max(rates)
    kept = f"The DeepSpeed JSON has a whole {kind}, and the job asks for no other shape."
    told = [kept, *deepspeed_warnings(kind, params, lr, updates)]
    described = LearningRate(
        schedule=None,
        advance=0,
        shape=kind,
        peak_lr=peak,
        floor_lr=rates[-1],
        warmup_updates=rates.index(peak),
        reasons=(
            *([_reason("peak_lr", advised)] if advised else []),
            *(Reason(choice="shape", value=kind, reason=sentence) for sentence in told),
        ),
    )
    return Decided(described, scheduler, lr)


def _in_json(problem: Problem, user: DsConfig) -> Problem:
    """A problem of the JSON's own scheduler at its place there. A peak that is too high is the scheduler's or, where
    that names none, the optimizer's."""
    key = problem.key or "scheduler"
    if not key.startswith("scheduler."):
        highest = "scheduler.params.warmup_max_lr"
        key = highest if user.get(highest) is not None else "optimizer.params.lr"
    return user.problem(key, problem.message, problem.hint)


def _idle(params: Params, rates: Sequence[float], user: DsConfig) -> Iterator[Problem]:
    """Updates that train nothing once the peak is past. Before it, a warm-up from 0 has its own."""
    idle = rates[rates.index(max(rates)) :].count(0.0)
    if idle:
        message = f"{idle} of the run's {len(rates)} updates run at rate 0 and train nothing"
        if "total_num_steps" in params and max(rates) > 0:
            hint = f'write {len(rates)}, or "auto"; {ALLOW}'
            yield user.problem("scheduler.params.total_num_steps", message, hint)
        else:
            yield user.problem("scheduler.params", message, f"give it a learning rate above 0; {ALLOW}")


def _refuse_other_length(inputs: PlanInputs[J], params: Params, updates: int) -> None:
    """Raises RequestError where the JSON's scheduler is for a run of another length than the job says."""
    job, user, total = inputs.job, inputs.ds_config, params.get("total_num_steps")
    for name in ("num_train_epochs", "total_samples"):
        if f"train.{name}" in inputs.explicit and total is not None and total != updates:
            found = f"{getattr(job.train, name)} in the job comes to {updates} updates"
            found += f", and total_num_steps is {total} in {_where(user, 'scheduler.params.total_num_steps')}"
            raise RequestError(Problem(found, key=f"train.{name}", hint=f'write {updates} there, or "auto"'))


def _where(user: DsConfig, path: str) -> str:
    """File and line of a key of the JSON."""
    place = user.location(path)
    return f"{user.file or user.origin}:{place.line}" if place else user.origin


def refuse_unused(inputs: PlanInputs[J], kind: str, params: Params) -> None:
    """Raises RequestError for what the job says of a schedule that the JSON's own scheduler decides otherwise."""
    job, user = inputs.job, inputs.ds_config
    used = {"schedule.peak_lr", "schedule.on_spike", "schedule.max_extensions", "schedule.check_every"}
    used |= {"schedule.allow_unsafe", "schedule.task"}
    filled = {"warmup": "warmup_num_steps", "floor": "cos_min_ratio"}
    used |= {f"schedule.{name}" for name, param in filled.items() if user.get(f"scheduler.params.{param}") == "auto"}
    same = {"warmup": params.get("warmup_num_steps"), "warmup_type": params.get("warmup_type")}
    if has_auto_warmup(user) or user.get("scheduler.params.warmup_type") == "auto":
        same["warmup_type"] = "linear"
    used |= {f"schedule.{name}" for name, value in same.items() if getattr(job.schedule, name) == value}
    hint = "name a schedule.shape, and a schedule is generated; or leave it to the JSON"
    problems = [
        Problem(f"{_where(user, 'scheduler')} has a {kind} of its own, which does not use it", key=key, hint=hint)
        for key in sorted(inputs.explicit)
        if key.startswith("schedule.") and key not in used
    ]
    peak, highest = job.schedule.peak_lr, params.get("warmup_max_lr")
    if peak != "auto" and highest is not None and peak != highest:
        place = _where(user, "scheduler.params.warmup_max_lr")
        found = f"{peak:g} in the job, and warmup_max_lr {highest:g} in {place}"
        problems.append(Problem(found, key="schedule.peak_lr", hint=hint))
    total = params.get("total_num_steps")
    if job.train.max_steps is not None and total is not None and total != job.train.max_steps:
        place = _where(user, "scheduler.params.total_num_steps")
        found = f"{job.train.max_steps} in the job, and total_num_steps {total} in {place}"
        problems.append(Problem(found, key="train.max_steps", hint='make them equal, or write "auto" there'))
    if problems:
        raise RequestError(*problems)


def _written_lr(job: AnyJob, scheduler: dict[str, Any], user: DsConfig) -> float | None:
    """The optimizer's rate beside a scheduler of the user's own; None where nothing says it."""
    in_json = (optimizer_of(user) or {}).get("params", {}).get("lr")
    in_job = None if job.schedule.peak_lr == "auto" else job.schedule.peak_lr
    for value in (in_json, in_job, scheduler["params"].get("warmup_max_lr")):
        if isinstance(value, int | float):
            return float(value)
    return None


def _advised_peak(job: AnyJob, kind: str, user: DsConfig, situation: Situation, known: bool) -> Choice:
    """The peak for a scheduler that follows the optimizer's rate. Raises RequestError where the model is not `known`,
    from whose size it is advised."""
    if known:
        return _choose(job, situation, None)["peak_lr"]
    message = f"the scheduler {kind} follows the optimizer's rate, and none is given"
    hint = "write it there, or set schedule.peak_lr in the job"
    raise RequestError(user.problem("optimizer.params.lr", message, hint))

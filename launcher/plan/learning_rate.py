"""The learning rate of a plan: the job's choices, advice for the rest, safety checks, and DeepSpeed's JSON blocks."""

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
from launcher.plan.schema import ChoiceReason, LearningRate, Length, Plan
from launcher.plan.situation import situation_of
from launcher.schedule.advice import Choice, Situation, advise
from launcher.schedule.curve import DEEPSPEED_TYPES, Schedule, deepspeed_blocks, lr_at, make_schedule
from launcher.schedule.deepspeed_schedulers import Params, replica
from launcher.schedule.safety import ALLOW, check_safety, deepspeed_warnings, log_ramp, unsafe_scheduler
from launcher.schedule.warmup import parse_warmup

_OPTIONS = ("decay_at", "decay_factor", "decay_start", "decay", "cycles", "segments")
_SHAPES = {kind: shape for shape, kind in DEEPSPEED_TYPES.items()}

UNLIMITED_METHOD = "unknown"
"""A method for which the safety rules have no maximum peak."""


@dataclass(frozen=True)
class LearningRateDecision:
    """The learning rate for the plan, and the values of the DeepSpeed JSON that set it."""

    learning_rate: LearningRate
    scheduler: dict[str, Any] | None
    optimizer_lr: float


def decide_lr(inputs: PlanInputs[Job], model: ModelFacts, data: DataFacts, length: Length) -> LearningRateDecision:
    """The scheduler of the user's JSON if it has one and the job names no shape, else a generated schedule.

    Raises RequestError for an invalid schedule, or for one that is unsafe without schedule.allow_unsafe.
    """
    situation = situation_of(
        inputs,
        model,
        inputs.job.model.lora,
        length.total_updates,
        tokens_per_update=length.tokens_per_update,
        dataset_samples=data.train.sequences,
    )
    return decide_schedule(inputs, situation)


def decide_schedule(inputs: PlanInputs[J], situation: Situation, *, limited: bool = True) -> LearningRateDecision:
    """The scheduler of the user's JSON, or a generated one if it has none or the job names a shape.

    A scheduler whose params are all "auto" is generated, in the shape of its type; if only some are, they are filled.
    `limited`: whether the peak is limited to published values for the situation's method and size. Raises RequestError.
    """
    job, user = inputs.job, inputs.ds_config
    written, lr = scheduler_of(user), (optimizer_of(user) or {}).get("params", {}).get("lr")
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float)):
        raise RequestError(user.problem("optimizer.params.lr", f"must be a number, found {lr!r}"))
    shape_in_job = "schedule.shape" in inputs.explicit
    shape = None if shape_in_job else _SHAPES.get(auto_scheduler(user) or "")
    if written is None or shape_in_job or shape:
        try:
            return generate(job, situation, lr, shape, limited=limited)
        except RequestError as error:
            raise RequestError(*(_at_optimizer_lr(problem, job, user, lr) for problem in error.problems)) from None
    return _user_schedule(inputs, _with_autos_filled(job, written, user, situation, lr), situation, limited)


def _at_optimizer_lr(problem: Problem, job: AnyJob, user: DsConfig, lr: float | None) -> Problem:
    """A problem of the peak at its location in the JSON, if the JSON's optimizer sets the peak."""
    if problem.key != "schedule.peak_lr" or job.schedule.peak_lr != "auto" or lr is None:
        return problem
    return user.problem("optimizer.params.lr", problem.message, problem.hint)


def _with_autos_filled(
    job: AnyJob, written: dict[str, Any], user: DsConfig, situation: Situation, lr: float | None
) -> dict[str, Any]:
    """The user's scheduler with each "auto" filled for which the plan has a value."""
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
    linear = {"warmup_type": "linear"} if has_auto_warmup(user) else {}
    return {**written, "params": {**written["params"], **filled, **linear}}


def generate(
    job: AnyJob,
    situation: Situation,
    written_lr: float | None = None,
    written_shape: str | None = None,
    *,
    limited: bool = True,
) -> LearningRateDecision:
    """The generated schedule of `job`: its own choices, and advice for the rest.

    `written_lr`, the optimizer's learning rate in the user's JSON, is the peak if the job sets none; `written_shape`,
    the shape of the JSON's scheduler, likewise.
    """
    section = job.schedule
    chosen = _choose(job, situation, written_lr, written_shape)
    options = {
        name: [segment.model_dump() for segment in value] if name == "segments" else value
        for name in _OPTIONS
        if (value := getattr(section, name)) is not None
    }
    shape_sets_floor = chosen["shape"].value in ("linear", "constant", "step", "compound")
    floor = None if section.floor == "auto" and shape_sets_floor else chosen["floor"].value
    schedule = make_schedule(
        chosen["shape"].value,
        peak_lr=chosen["peak_lr"].value,
        warmup_updates=chosen["warmup"].value,
        total_updates=situation.total_updates,
        floor=floor,
        warmup_type=section.warmup_type,
        **options,
    )
    method = situation.method if limited else UNLIMITED_METHOD
    problems = check_safety(schedule, method=method, parameters=situation.parameters)
    if problems and not section.allow_unsafe:
        raise RequestError(*problems)
    if situation.method != "full":
        reason = "Adapters are trained, so the advice and the safety limits are those published for adapters."
        chosen = {"method": _user_choice(situation.method, reason), **chosen}
    if ramp := log_ramp(schedule):
        chosen["warmup_type"] = _user_choice("log", ramp)
    return LearningRateDecision(
        _learning_rate(schedule, chosen), deepspeed_blocks(schedule)["scheduler"], schedule.peak_lr
    )


def planned_lrs(plan: Plan) -> Callable[[int], float]:
    """A function from the number of an update (from 0, without skipped ones) to its learning rate in the plan."""
    if plan.learning_rate.schedule is None or not plan.learning_rate.advance:
        scheduler, optimizer = plan.ds_config["scheduler"], plan.ds_config["optimizer"]
        return replica(scheduler["type"], scheduler["params"], optimizer["params"]["lr"]).lr_after
    schedule = schedule_of(plan)
    return lambda update: lr_at(schedule, update)


def _choose(
    job: AnyJob, situation: Situation, written_lr: float | None, written_shape: str | None = None
) -> dict[str, Choice]:
    """The user's choices, and advice for the rest that takes them into account, by name."""
    section = job.schedule
    chosen: dict[str, Choice] = {}
    if section.peak_lr != "auto":
        chosen["peak_lr"] = _user_choice(section.peak_lr, f"schedule.peak_lr in the job is {section.peak_lr:g}.")
    elif written_lr is not None:
        reason = f"The optimizer's learning rate in the DeepSpeed JSON is {written_lr:g}."
        chosen["peak_lr"] = _user_choice(written_lr, reason)
    if section.warmup != "auto":
        updates = parse_warmup(section.warmup, situation.total_updates, situation.tokens_per_update)
        chosen["warmup"] = _user_choice(updates, f"schedule.warmup in the job is {section.warmup}.")
    if section.shape != "auto":
        chosen["shape"] = _user_choice(section.shape, f"schedule.shape in the job is {section.shape}.")
    elif written_shape is not None:
        kind = DEEPSPEED_TYPES[written_shape]
        reason = f"The DeepSpeed JSON's scheduler is a {kind} whose params are auto."
        chosen["shape"] = _user_choice(written_shape, reason)
    if section.floor != "auto":
        chosen["floor"] = _user_choice(section.floor, f"schedule.floor in the job is {section.floor:g} of the peak.")
    advice = advise(
        situation,
        shape=chosen["shape"].value if "shape" in chosen else None,
        warmup_updates=chosen["warmup"].value if "warmup" in chosen else None,
    )
    advised = {
        "peak_lr": advice.peak_lr,
        "warmup": advice.warmup_updates,
        "shape": advice.shape,
        "floor": advice.floor,
    }
    further = {} if "peak_lr" in chosen else {"sweep": advice.sweep}
    return {**advised, **chosen, **further, "beta2": advice.beta2}


def _user_choice(value: Any, reason: str) -> Choice:
    return Choice(value, None, None, reason, (), heuristic=False)


def _learning_rate(schedule: Schedule, chosen: dict[str, Choice]) -> LearningRate:
    return LearningRate(
        schedule=schedule.to_dict(),
        advance=1,
        shape=schedule.shape,
        peak_lr=schedule.peak_lr,
        floor_lr=schedule.floor_lr,
        warmup_updates=schedule.warmup_updates,
        reasons=tuple(_reason(name, choice) for name, choice in chosen.items()),
    )


def _reason(name: str, choice: Choice) -> ChoiceReason:
    return ChoiceReason(
        choice=name,
        value=choice.value,
        low=choice.low,
        high=choice.high,
        reason=choice.reason,
        sources=choice.sources,
        heuristic=choice.heuristic,
    )


def _user_schedule(
    inputs: PlanInputs[J], scheduler: dict[str, Any], situation: Situation, limited: bool
) -> LearningRateDecision:
    """The user's own scheduler, as DeepSpeed steps it. Raises RequestError if it is unsafe or contradicts the job."""
    job, user = inputs.job, inputs.ds_config
    kind, params = scheduler["type"], scheduler["params"]
    updates, method = situation.total_updates, situation.method if limited else UNLIMITED_METHOD
    check_unused_keys(inputs, kind, params)
    _check_same_length(inputs, params, updates)
    lr, advised = _written_lr(job, scheduler, user), None
    if lr is None:
        advised = _advised_peak(job, kind, user, situation, limited)
        lr = float(advised.value)
    curve = replica(kind, params, lr)
    lrs = [curve.lr_after(update) for update in range(updates)]
    problems = unsafe_scheduler(kind, params, lr, updates, method=method, parameters=situation.parameters)
    problems = [*(_in_json(problem, user) for problem in problems), *_zero_lr_problems(params, lrs, user)]
    if problems and not job.schedule.allow_unsafe:
        raise RequestError(*problems)
    peak = max(lrs)
    kept = f"The DeepSpeed JSON has a {kind}, and the job names no other shape."
    sentences = [kept, *deepspeed_warnings(kind, params, lr, updates)]
    learning_rate = LearningRate(
        schedule=None,
        advance=0,
        shape=kind,
        peak_lr=peak,
        floor_lr=lrs[-1],
        warmup_updates=lrs.index(peak),
        reasons=(
            *([_reason("peak_lr", advised)] if advised else []),
            *(ChoiceReason(choice="shape", value=kind, reason=sentence) for sentence in sentences),
        ),
    )
    return LearningRateDecision(learning_rate, scheduler, lr)


def _in_json(problem: Problem, user: DsConfig) -> Problem:
    """A problem of the JSON's scheduler at its location: for the peak, warmup_max_lr if set, else the optimizer lr."""
    key = problem.key or "scheduler"
    if not key.startswith("scheduler."):
        highest = "scheduler.params.warmup_max_lr"
        key = highest if user.get(highest) is not None else "optimizer.params.lr"
    return user.problem(key, problem.message, problem.hint)


def _zero_lr_problems(params: Params, lrs: Sequence[float], user: DsConfig) -> Iterator[Problem]:
    """A problem if updates after the peak have learning rate 0. Before it, a warm-up may start at 0."""
    zeros = lrs[lrs.index(max(lrs)) :].count(0.0)
    if zeros:
        message = f"{zeros} of the run's {len(lrs)} updates have learning rate 0 and train nothing"
        if "total_num_steps" in params and max(lrs) > 0:
            hint = f'set it to {len(lrs)} or "auto"; {ALLOW}'
            yield user.problem("scheduler.params.total_num_steps", message, hint)
        else:
            yield user.problem("scheduler.params", message, f"set a learning rate above 0; {ALLOW}")


def _check_same_length(inputs: PlanInputs[J], params: Params, updates: int) -> None:
    """Raises RequestError if the JSON's scheduler has another length than the job's epochs or samples."""
    job, user, total = inputs.job, inputs.ds_config, params.get("total_num_steps")
    for name in ("num_train_epochs", "total_samples"):
        if f"train.{name}" in inputs.explicit and total is not None and total != updates:
            found = f"{getattr(job.train, name)} in the job gives {updates} updates"
            found += f", but total_num_steps is {total} in {_where(user, 'scheduler.params.total_num_steps')}"
            raise RequestError(Problem(found, key=f"train.{name}", hint=f'set total_num_steps to {updates} or "auto"'))


def _where(user: DsConfig, path: str) -> str:
    """File and line of a key of the JSON."""
    location = user.location(path)
    return f"{user.file or user.origin}:{location.line}" if location else user.origin


def check_unused_keys(inputs: PlanInputs[J], kind: str, params: Params) -> None:
    """Raises RequestError for keys of the job's schedule that the JSON's own scheduler does not use or contradicts."""
    job, user = inputs.job, inputs.ds_config
    used = {"schedule.peak_lr", "schedule.on_spike", "schedule.max_extensions", "schedule.check_every"}
    used |= {"schedule.allow_unsafe", "schedule.task"}
    filled = {"warmup": "warmup_num_steps", "floor": "cos_min_ratio"}
    used |= {f"schedule.{name}" for name, param in filled.items() if user.get(f"scheduler.params.{param}") == "auto"}
    same = {"warmup": params.get("warmup_num_steps"), "warmup_type": params.get("warmup_type")}
    if has_auto_warmup(user) or user.get("scheduler.params.warmup_type") == "auto":
        same["warmup_type"] = "linear"
    used |= {f"schedule.{name}" for name, value in same.items() if getattr(job.schedule, name) == value}
    hint = "set schedule.shape to generate a schedule, or remove this key"
    problems = [
        Problem(f"the {kind} in {_where(user, 'scheduler')} does not use it", key=key, hint=hint)
        for key in sorted(inputs.explicit)
        if key.startswith("schedule.") and key not in used
    ]
    peak, highest = job.schedule.peak_lr, params.get("warmup_max_lr")
    if peak != "auto" and highest is not None and peak != highest:
        place = _where(user, "scheduler.params.warmup_max_lr")
        found = f"{peak:g} in the job, but warmup_max_lr is {highest:g} in {place}"
        problems.append(Problem(found, key="schedule.peak_lr", hint=hint))
    total = params.get("total_num_steps")
    if job.train.max_steps is not None and total is not None and total != job.train.max_steps:
        place = _where(user, "scheduler.params.total_num_steps")
        found = f"{job.train.max_steps} in the job, but total_num_steps is {total} in {place}"
        problems.append(Problem(found, key="train.max_steps", hint='make them equal, or set total_num_steps to "auto"'))
    if problems:
        raise RequestError(*problems)


def _written_lr(job: AnyJob, scheduler: dict[str, Any], user: DsConfig) -> float | None:
    """The optimizer's learning rate for the user's own scheduler; None if neither JSON nor job sets it."""
    in_json = (optimizer_of(user) or {}).get("params", {}).get("lr")
    in_job = None if job.schedule.peak_lr == "auto" else job.schedule.peak_lr
    for value in (in_json, in_job, scheduler["params"].get("warmup_max_lr")):
        if isinstance(value, int | float):
            return float(value)
    return None


def _advised_peak(job: AnyJob, kind: str, user: DsConfig, situation: Situation, known: bool) -> Choice:
    """The advised peak for a scheduler that uses the optimizer's learning rate. Raises RequestError if the model is not
    `known`, since the advice depends on its size."""
    if known:
        return _choose(job, situation, None)["peak_lr"]
    message = f"the scheduler {kind} uses the optimizer's learning rate, which is not set"
    hint = "set it, or set schedule.peak_lr in the job"
    raise RequestError(user.problem("optimizer.params.lr", message, hint))

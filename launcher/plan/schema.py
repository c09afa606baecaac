"""The plan: every decision about a run, made once, with a hash that all ranks compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from launcher.errors import FailureCode, LauncherError, first_line
from launcher.job import AnyJob, Job, ScriptJob
from launcher.job.set_keys import changed_keys, set_keys, with_set_keys
from launcher.plan.facts import DataFacts, MachineFacts, ModelFacts

FORMAT = 3
"""The format of plan.json and of its hash. Format 1 did not store which of the job's keys were set; format 2 had no
workload."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class World(Part):
    """Ranks, contiguous per node: node k has ranks k·P to (k+1)·P − 1.

    Groups of `sequence_parallel_size` consecutive ranks share their sequences; there are `data_parallel_size` groups.
    """

    nodes: int
    processes_per_node: int
    device: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    threads_per_process: int
    sequence_parallel_size: int = 1

    @property
    def size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def data_parallel_size(self) -> int:
        return self.size // self.sequence_parallel_size


class Length(Part):
    """How long the run is. `refilled_samples` of another epoch fill up the last update.

    For a script, `updates_per_epoch` and `tokens_per_update` are unknown and 0.
    """

    total_updates: int
    updates_per_epoch: float
    samples: int
    tokens_per_update: float
    refilled_samples: int


class ChoiceReason(Part):
    """Why a value was chosen: its name, the value, the recommended range, a sentence, and its sources."""

    choice: str
    value: Any
    low: Any = None
    high: Any = None
    reason: str
    sources: tuple[str, ...] = ()
    heuristic: bool = False


class LearningRate(Part):
    """The learning rate of every update.

    `schedule` is a generated schedule (launcher.schedule.curve). `advance` is the number of steps that its DeepSpeed
    scheduler is advanced when a run starts: 0 in a user's script, where DeepSpeed makes two updates at the starting
    learning rate. If the plan has the scheduler of the user's JSON, `schedule` is None, the scheduler is in the plan's
    ds_config and DeepSpeed steps it as usual.
    """

    schedule: dict[str, Any] | None
    advance: int
    shape: str
    peak_lr: float
    floor_lr: float
    warmup_updates: int
    reasons: tuple[ChoiceReason, ...] = ()


class ConfigChange(Part):
    """A key of the user's DeepSpeed JSON that was filled in or changed."""

    key: str
    before: Any
    after: Any
    reason: str


class Candidate(Part):
    """A preset that `deepspeed: auto` considered: the bytes that a rank needs with a micro-batch, and whether it fits.

    `host_bytes` is the host memory of a node; on CPUs it includes all its ranks.
    """

    preset: str
    micro_batch: int
    device_bytes: int
    host_bytes: int
    fits: bool


class Recommendation(Part):
    """The preset that `deepspeed: auto` chose, why, and the candidates in the order of preference.

    `device_room` and `host_room` are the available bytes of a rank's device (None if no GPU is visible) and of a node.
    """

    preset: str
    reason: str
    device_room: int | None
    host_room: int
    candidates: tuple[Candidate, ...]


class Resumed(Part):
    """Where a plan resumes a run: the updates (in the plan's batches) and samples already done, and the arithmetic."""

    update: int
    samples: int
    arithmetic: str


class Training(Part):
    """Fine-tuning by the launcher itself. `memory` is the estimate of one rank's bytes, by content.

    `chunked_loss`: the loss is computed for a chunk of tokens at a time.
    `background_copy_bytes` is the host memory of a node for the copies of a checkpoint that is written in the
    background; None if training waits while a checkpoint is written.
    """

    kind: Literal["training"] = "training"
    job: Job
    model: ModelFacts
    data: DataFacts
    memory: dict[str, int]
    chunked_loss: bool = False
    background_copy_bytes: int | None = None
    recommendation: Recommendation | None = None


class Script(Part):
    """The user's own training script, which loads its own model and data.

    Every rank runs Python with `arguments` in `folder`, which all nodes see; the plan's numbers replace their names in
    braces. `model` is the model that the job names for advice.
    """

    kind: Literal["script"] = "script"
    job: ScriptJob
    model: ModelFacts | None
    arguments: tuple[str, ...]
    folder: str


class Plan(Part):
    """A resolved job. Equal plans have equal hashes."""

    launcher: str
    workload: Annotated[Training | Script, Field(discriminator="kind")]
    machine: MachineFacts
    world: World
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: int
    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    length: Length
    learning_rate: LearningRate
    ds_config: dict[str, Any]
    ds_config_changes: tuple[ConfigChange, ...]
    warnings: tuple[str, ...]
    resumed: Resumed | None = None

    @property
    def job(self) -> AnyJob:
        return self.workload.job

    @property
    def training(self) -> Training:
        """The workload of a training. Raises TypeError for the plan of a script."""
        if not isinstance(self.workload, Training):
            raise TypeError("this is the plan of a script")
        return self.workload

    @property
    def sha256(self) -> str:
        """The hash of the whole plan: 64 hexadecimal digits."""
        return _hash(self.model_dump(mode="json"), FORMAT)

    def to_json(self) -> str:
        """The text of plan.json: the plan, its hash, and which of the job's keys were set."""
        plan = self.model_dump(mode="json")
        document = {"format": FORMAT, "sha256": _hash(plan, FORMAT), "set_keys": set_keys(self.job), "plan": plan}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "plan.json") -> Plan:
        """The plan that `to_json` wrote, in this format or an older one. Raises LauncherError if it was changed.

        For a job in format 1, keys count as set if their values differ from the defaults. `name` is the file's name in
        messages.
        """
        try:
            document = json.loads(text)
            recorded, data, form = str(document["sha256"]), document["plan"], document.get("format", 1)
            if form not in range(1, FORMAT + 1):
                raise ValueError(f"it has format {form}, but this launcher reads formats 1 to {FORMAT}")
            plan = cls.model_validate(data if form == FORMAT else _upgraded(data))
            keys = changed_keys(plan.job) if form == 1 else document["set_keys"]
            plan = _with_set_keys(plan, keys)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"{name} is damaged, or from another version of the launcher: {first_line(error)}"
            raise LauncherError(message, code=FailureCode.PLAN_DAMAGED) from None
        if _hash(data, form) != recorded:
            message = f"{name} was changed: its content does not match its hash {recorded[:12]}…"
            raise LauncherError(message, code=FailureCode.PLAN_DAMAGED)
        return plan


def _with_set_keys(plan: Plan, keys: Iterable[str]) -> Plan:
    workload = plan.workload
    if isinstance(workload, Training):
        marked: Training | Script = workload.model_copy(update={"job": with_set_keys(workload.job, keys)})
    else:
        marked = workload.model_copy(update={"job": with_set_keys(workload.job, keys)})
    return plan.model_copy(update={"workload": marked})


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """A plan of format 1 or 2, which had no workload, in the current format."""
    plan = dict(old)
    job, model, data, memory = (plan.pop(name) for name in ("job", "model", "data", "memory"))
    recommendation, script = plan.pop("recommendation", None), plan.pop("script", None)
    if script is None:
        parts = {"kind": "training", "data": data, "memory": memory, "recommendation": recommendation}
    else:
        parts = {"kind": "script", **script}
    return {**plan, "workload": {**parts, "job": job, "model": model}}


def hash_in(text: str) -> str:
    """The hash that a plan.json records. The plan read from an older file has another hash, since it has newer keys."""
    return str(json.loads(text)["sha256"])


def _hash(plan: Any, form: int) -> str:
    """SHA-256 of the plan as JSON with sorted keys; from format 3 on, the hash includes the format."""
    text = json.dumps(plan if form < 3 else {"format": form, "plan": plan}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

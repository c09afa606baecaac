"""The plan: everything a run will do, decided once, with a hash that every rank compares."""

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
"""The format of plan.json, and of its hash. Format 1 did not keep which of the job's keys were set; format 2 had no
workload."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class World(Part):
    """Ranks, contiguous per node: node k has ranks k·P to (k+1)·P − 1.

    Each `sequence_parallel_size` ranks in a row share their sequences; there are `data_parallel_size` such groups.
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
    """How long the run is. `refilled_samples` of a next epoch make the last update a whole one.

    What is not known of a script's data, `updates_per_epoch` and `tokens_per_update`, is 0.
    """

    total_updates: int
    updates_per_epoch: float
    samples: int
    tokens_per_update: float
    refilled_samples: int


class Reason(Part):
    """Why something was chosen: what, the value, the range that would do, a sentence, and where it comes from."""

    choice: str
    value: Any
    low: Any = None
    high: Any = None
    reason: str
    sources: tuple[str, ...] = ()
    heuristic: bool = False


class LearningRate(Part):
    """The rate of every update.

    `schedule` is a generated schedule (launcher.schedule.curve) and `advance` the steps its DeepSpeed scheduler is
    moved on a fresh start: none in a script of the user's, where DeepSpeed spends two updates at the starting rate. A
    scheduler of the user's own JSON has no `schedule`, is driven as DeepSpeed drives it, and stands in the plan's
    ds_config.
    """

    schedule: dict[str, Any] | None
    advance: int
    shape: str
    peak_lr: float
    floor_lr: float
    warmup_updates: int
    reasons: tuple[Reason, ...] = ()


class Change(Part):
    """One key of the user's DeepSpeed JSON that was filled or altered."""

    key: str
    before: Any
    after: Any
    reason: str


class Candidate(Part):
    """A preset that `deepspeed: auto` weighed: the bytes that a rank needs with that micro-batch, and whether it fits.

    `host_bytes` are of a node; on a CPU they are those of all its ranks.
    """

    preset: str
    micro_batch: int
    device_bytes: int
    host_bytes: int
    fits: bool


class Recommendation(Part):
    """What `deepspeed: auto` came to, why, and the candidates in the order in which they were weighed.

    `device_room` and `host_room` are the bytes that a rank's device and a node may give; None where they are not seen.
    """

    preset: str
    reason: str
    device_room: int | None
    host_room: int
    candidates: tuple[Candidate, ...]


class Resumed(Part):
    """Where a plan goes on with a run: after how many updates (in its own count) and samples, and how that was got."""

    update: int
    samples: int
    arithmetic: str


class Training(Part):
    """Fine-tuning by the launcher itself. `memory` are the bytes of one rank, by what they hold."""

    kind: Literal["training"] = "training"
    job: Job
    model: ModelFacts
    data: DataFacts
    memory: dict[str, int]
    recommendation: Recommendation | None = None


class Script(Part):
    """Your own training script, which brings its model and data.

    Every rank runs Python with `arguments` in `folder`, which all nodes see; numbers of the plan replace their names in
    braces. `model` is the one that the job names for advice.
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
    ds_config_changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    resumed: Resumed | None = None

    @property
    def job(self) -> AnyJob:
        return self.workload.job

    @property
    def training(self) -> Training:
        """The workload of a plan that is known to be for training. Raises TypeError for a script's."""
        if not isinstance(self.workload, Training):
            raise TypeError("this is the plan of a script")
        return self.workload

    @property
    def sha256(self) -> str:
        """The hash of the whole plan: 64 hexadecimal digits."""
        return _hash(self.model_dump(mode="json"), FORMAT)

    def to_json(self) -> str:
        """plan.json: the plan, its hash, and which of the job's keys were set."""
        plan = self.model_dump(mode="json")
        document = {"format": FORMAT, "sha256": _hash(plan, FORMAT), "set_keys": set_keys(self.job), "plan": plan}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "plan.json") -> Plan:
        """The plan that `to_json` wrote, in this format or an older one. Raises LauncherError if it was changed.

        For a job in format 1, keys count as set if their values differ from the defaults. `name` is that of the file,
        for messages.
        """
        try:
            document = json.loads(text)
            named, data, form = str(document["sha256"]), document["plan"], document.get("format", 1)
            if form not in range(1, FORMAT + 1):
                raise ValueError(f"it has format {form}, and this launcher reads formats 1 to {FORMAT}")
            plan = cls.model_validate(data if form == FORMAT else _upgraded(data))
            keys = changed_keys(plan.job) if form == 1 else document["set_keys"]
            plan = _with_set_keys(plan, keys)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"{name} is damaged, or of another version of the launcher: {first_line(error)}"
            raise LauncherError(message, code=FailureCode.PLAN_DAMAGED) from None
        if (found := _hash(data, form)) != named:
            message = f"{name} was altered: it names the hash {named[:12]}… and has {found[:12]}…"
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
    """The plan of format 1 or 2, which had no workload, in the present format."""
    plan = dict(old)
    job, model, data, memory = (plan.pop(name) for name in ("job", "model", "data", "memory"))
    recommendation, script = plan.pop("recommendation", None), plan.pop("script", None)
    if script is None:
        parts = {"kind": "training", "data": data, "memory": memory, "recommendation": recommendation}
    else:
        parts = {"kind": "script", **script}
    return {**plan, "workload": {**parts, "job": job, "model": model}}


def hash_in(text: str) -> str:
    """The hash that a plan.json names. A key that is newer than the file gives the plan that is read another one."""
    return str(json.loads(text)["sha256"])


def _hash(plan: Any, form: int) -> str:
    """SHA-256 of the plan as JSON with sorted keys; from format 3 on, the format is a part of what is hashed."""
    text = json.dumps(plan if form < 3 else {"format": form, "plan": plan}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

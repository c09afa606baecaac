"""The plan: everything a run will do, decided once, with a hash that every rank compares."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launcher.errors import FailureCode, LauncherError, first_line
from launcher.job import Job, ScriptJob
from launcher.job.set_keys import changed_keys, set_keys, with_set_keys
from launcher.plan.facts import DataFacts, MachineFacts, ModelFacts

FORMAT = 2
"""The format of plan.json. Format 1 did not keep which of the job's keys were set."""


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


class Plan(Part):
    """A resolved job. Equal plans have equal hashes."""

    launcher: str
    job: Job
    model: ModelFacts
    data: DataFacts
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
    memory: dict[str, int]
    warnings: tuple[str, ...]
    recommendation: Recommendation | None = None
    resumed: Resumed | None = None

    @property
    def sha256(self) -> str:
        """The hash of the whole plan: 64 hexadecimal digits."""
        return _hash(self.model_dump(mode="json"))

    def to_json(self) -> str:
        """plan.json: the plan, its hash, and which of the job's keys were set."""
        plan = self.model_dump(mode="json")
        document = {"format": FORMAT, "sha256": _hash(plan), "set_keys": set_keys(self.job), "plan": plan}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "plan.json") -> Plan:
        """The plan that `to_json` wrote, now or in format 1. Raises LauncherError where its content was changed.

        Of a job in format 1 the keys count as set whose values differ from the defaults. `name` is that of the file,
        for messages.
        """
        try:
            document = json.loads(text)
            named, data, form = str(document["sha256"]), document["plan"], document.get("format", 1)
            if form not in (1, FORMAT):
                raise ValueError(f"it has format {form}, and this launcher reads formats 1 and {FORMAT}")
            kind = ScriptPlan if "script" in data else cls
            plan = kind.model_validate(data)
            keys = document["set_keys"] if form == FORMAT else changed_keys(plan.job)
            plan = plan.model_copy(update={"job": with_set_keys(plan.job, keys)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = first_line(error)
            message = f"{name} is damaged, or of another version of the launcher: {reason}"
            raise LauncherError(message, code=FailureCode.PLAN_DAMAGED) from None
        if (found := _hash(data)) != named:
            message = f"{name} was altered: it names the hash {named[:12]}… and has {found[:12]}…"
            raise LauncherError(message, code=FailureCode.PLAN_DAMAGED)
        return plan


class Script(Part):
    """What every rank runs: Python with these arguments, in a folder that all nodes see.

    The arguments are as the user wrote them, with names in braces where the plan's numbers go.
    """

    arguments: tuple[str, ...]
    folder: str


class ScriptPlan(Plan):
    """The plan of a script of the user's own, which brings model and data: of the data nothing is known."""

    job: ScriptJob
    # What carries a plan out itself asks for a Plan, in which both are there.
    model: ModelFacts | None  # type: ignore[assignment]
    data: None = None  # type: ignore[assignment]
    script: Script


def hash_in(text: str) -> str:
    """The hash that a plan.json names. A key that is newer than the file gives the plan that is read another one."""
    return str(json.loads(text)["sha256"])


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

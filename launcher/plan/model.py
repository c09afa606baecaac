"""The plan: everything a run will do, decided once, with a hash that every rank compares."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launcher.errors import LauncherError, first_line
from launcher.job import Job
from launcher.plan.facts import DataFacts, MachineFacts, ModelFacts


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class World(Part):
    """Ranks, contiguous per node: node k has ranks k·P to (k+1)·P − 1."""

    nodes: int
    processes_per_node: int
    device: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    threads_per_process: int

    @property
    def size(self) -> int:
        return self.nodes * self.processes_per_node


class Length(Part):
    """How long the run is. `refilled_samples` of a next epoch make the last update a whole one."""

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
    moved on a fresh start; a scheduler of the user's own JSON has no `schedule`, is driven as DeepSpeed drives it, and
    stands in the plan's ds_config.
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
    resumed: Resumed | None = None

    @property
    def sha256(self) -> str:
        """The hash of the whole plan: 64 hexadecimal digits."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json")).encode()).hexdigest()

    def to_json(self) -> str:
        """plan.json: the plan and its hash."""
        return json.dumps({"sha256": self.sha256, "plan": self.model_dump(mode="json")}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises LauncherError where it does not have the hash that it names."""
        try:
            document = json.loads(text)
            named = str(document["sha256"])
            plan = cls.model_validate(document["plan"])
        except (ValueError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise LauncherError(f"plan.json is damaged, or of another version of the launcher: {reason}") from None
        if plan.sha256 != named:
            raise LauncherError(f"plan.json was altered: it names the hash {named[:12]}… and has {plan.sha256[:12]}…")
        return plan


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))

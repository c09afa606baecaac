"""Types of the messages between ranks, agents and supervisor, and of the lines and files of a run directory.

Writers use these types. Readers of files that may be damaged check each value that they use, and keep plain dicts.
None of these messages and files has a format version. Times in files are UTC text (`files.utc_text`); times in reports
are seconds since the epoch. A float that is NaN or Inf is written as text (`files.json_number`).
"""

# Without `from __future__ import annotations`, which would hide NotRequired from `__required_keys__`.

import json
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, TypeGuard, final

Number = float | str
"""A float, or "nan", "inf" or "-inf"."""
RunState = Literal[
    "planning",
    "preparing",
    "placing",
    "starting",
    "training",
    "saving",
    "exporting",
    "finished",
    "failed",
    "stopped",
]
Phase = Literal["loading", "training", "saving", "exporting"]

# Reports: a rank sends JSON lines to its agent, which passes all but updates on to the supervisor.


class _Report(TypedDict):
    time: float
    rank: NotRequired[int]
    """Added by the agent."""
    node_rank: NotRequired[int]
    """Added by the supervisor."""


class ReadyReport(_Report):
    """The rank has loaded its libraries and waits for the order to start."""

    report: Literal["ready"]


class PhaseReport(_Report):
    """The rank starts a phase, after `update` updates; every rank reports "loading", the first rank all others."""

    report: Literal["phase"]
    phase: Phase
    update: NotRequired[int]


class EventReport(_Report):
    """An event of the first rank, for events.jsonl: one of `RankEvent`, with its other keys in `details`."""

    report: Literal["event"]
    event: str
    details: Mapping[str, object]


class UpdateReport(_Report):
    """The rank has made an update. A script reports no `own_seconds` and may report no GPU memory."""

    report: Literal["update"]
    update: int
    step_seconds: float | None
    gpu_memory_used_bytes: NotRequired[int | None]
    own_seconds: NotRequired[float]


class StoppedReport(_Report):
    """The rank stopped after `update` updates: on an order (`reason` is None), or because of the spike guard."""

    report: Literal["stopped"]
    update: int
    reason: str | None
    code: str | None


class FailedReport(_Report):
    """The rank raised an exception."""

    report: Literal["failed"]
    host: str
    code: str
    error: str
    message: str
    traceback: str


class DoneReport(_Report):
    """The rank has finished or stopped, and exits."""

    report: Literal["done"]


class ExitReport(_Report):
    """The agent's report on the end of a rank's process; `code` is negative for a signal."""

    report: Literal["exit"]
    code: int


class NodeLostReport(_Report):
    """The supervisor's own report on a node whose agent is gone; without `rank`."""

    report: Literal["node-lost"]
    message: str


RankReport = ReadyReport | PhaseReport | EventReport | UpdateReport | StoppedReport | FailedReport | DoneReport
AgentReport = RankReport | ExitReport
Report = AgentReport | NodeLostReport
_RANK_REPORTS = ("ready", "phase", "event", "update", "stopped", "failed", "done")


def parse_report(line: bytes) -> RankReport | None:
    """The report on a line from a rank; None if the line is not a report."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if _is_report(value) else None


def _is_report(value: object) -> TypeGuard[RankReport]:
    return isinstance(value, dict) and value.get("report") in _RANK_REPORTS


# Orders: the supervisor sends them through the agents to every rank.


class Go(TypedDict):
    """Environment variables of every rank, and the checkpoint to start from: a `plan.resume.Start` as JSON."""

    env: dict[str, str]
    start: NotRequired[dict[str, Any] | None]


@final
class GoOrder(TypedDict):
    """Start the work."""

    go: Go


@final
class StopOrder(TypedDict):
    """Stop after the current update, and save."""

    stop: Literal[True]


Order = GoOrder | StopOrder


# state.json and events.jsonl


class StateDetails(TypedDict, total=False):
    """What a state may add. `reason` is one line and `message` the whole error; `code` is an `errors.FailureCode`."""

    update: int | None
    reason: str | None
    message: str
    code: str | None


class JobIds(TypedDict, total=False):
    """The Slurm job or the Ray job of the run."""

    slurm_job_id: str
    ray_job_id: str


class StateRecord(StateDetails, JobIds):
    """state.json: the run's state, and the launcher that wrote it."""

    state: RunState
    since: str
    host: str
    pid: int


class StateEvent(StateDetails):
    event: Literal["state"]
    state: RunState


class OverridesEvent(TypedDict):
    event: Literal["overrides"]
    values: list[str]


class PlanEvent(TypedDict):
    event: Literal["plan"]
    sha256: str
    updates: int


class NodeEvent(TypedDict):
    """A node was placed. Its clock is `clock_offset_seconds` ahead of the supervisor's."""

    event: Literal["node"]
    node_rank: int
    host: str
    address: str
    interface: str | None
    gpus: list[str]
    clock_offset_seconds: float


class SpareNodeEvent(TypedDict):
    """A node was placed that has no ranks, and takes the place of a node that is lost."""

    event: Literal["spare_node"]
    host: str
    address: str


class NodeExcludedEvent(TypedDict):
    """The run does not use the host any more."""

    event: Literal["node_excluded"]
    host: str
    reason: str


class HealthEvent(TypedDict):
    """The health checks of a node: fields of `fleet.health.NodeHealth`, and its failed checks."""

    event: Literal["health"]
    node_rank: int
    host: str
    disk_bytes_per_second: float | None
    gpus: list[dict[str, Any]]
    xids: list[dict[str, Any]]
    matmuls: list[dict[str, Any]]
    links: dict[str, float]
    ring_bytes_per_second: float | None
    unknown: list[str]
    failed: list[dict[str, Any]]


class ResumeEvent(TypedDict):
    event: Literal["resume"]
    update: int
    samples: int
    overrides: list[str]


class RestartEvent(TypedDict):
    """The ranks start again: after a failure, with the reason; or a script, after Slurm requeued its job.

    `update` is that of the checkpoint from which a training resumes; None for a script.
    """

    event: Literal["restart"]
    attempt: NotRequired[int]
    update: NotRequired[int | None]
    reason: NotRequired[str]


class NoRestartEvent(TypedDict):
    """The run failed, and does not start again."""

    event: Literal["no_restart"]
    reason: str


class CheckpointDamagedEvent(TypedDict):
    """`checkpoint` is damaged, and `used` was used instead. Its folder was renamed to `renamed_to`, if it could be."""

    event: Literal["checkpoint_damaged"]
    checkpoint: str
    reason: str
    used: str
    renamed_to: str | None


class UploadedEvent(TypedDict):
    """A checkpoint, or the export, is complete in cloud storage."""

    event: Literal["uploaded"]
    what: str
    url: str
    bytes: int
    seconds: float


class UploadFailedEvent(TypedDict):
    """Cloud storage cannot be reached; only the first of several failed attempts. The attempts continue."""

    event: Literal["upload_failed"]
    url: str
    reason: str


class UploadGivenUpEvent(TypedDict):
    """A checkpoint is not uploaded: it was removed here, or it is damaged."""

    event: Literal["upload_given_up"]
    checkpoint: str
    reason: str


class StopRequestedEvent(TypedDict):
    event: Literal["stop_requested"]
    now: bool
    by: str


class ContinuedEvent(TypedDict):
    """The time limit of the Slurm job `continues` stopped the run, and `job` continues it, the `number`-th in a row."""

    event: Literal["continued"]
    job: str
    continues: str
    number: int
    update: int


class NotContinuedEvent(TypedDict):
    """The time limit stopped the run, and no other Slurm job was submitted that continues it."""

    event: Literal["not_continued"]
    reason: str


class OtherRateEvent(TypedDict):
    """A script made an update with a learning rate that is not the plan's."""

    event: Literal["other_rate"]
    update: int
    lr: float
    planned_lr: float
    reason: str


class FailedRank(TypedDict):
    """The failure of a rank, or of a node (`rank` is None), in a failure event; `time` in seconds since the epoch."""

    rank: int | None
    node_rank: int
    time: float
    how: str
    error: str | None
    traceback: str | None
    exit_code: int | None
    code: str
    host: str


class FailureEvent(TypedDict):
    """An attempt of the run failed: the first failure, and all failures, the first one at the start."""

    event: Literal["failure"]
    attempt: int
    rank: int | None
    node_rank: int
    host: str
    how: str
    exit_code: int | None
    code: str
    error: str | None
    failures: list[FailedRank]


class CheckpointEvent(TypedDict):
    event: Literal["checkpoint"]
    update: int
    samples: int


class OutlierEvent(TypedDict):
    event: Literal["outlier"]
    update: int
    reason: str


class SpikeEvent(TypedDict):
    event: Literal["spike"]
    update: int
    reason: str
    remedy: str


class NotExtendedEvent(TypedDict):
    """The remedy of a spike was not applied."""

    event: Literal["not_extended"]
    update: int
    reason: str


class WarmupExtendedEvent(TypedDict):
    """The remedy of a spike: a new revision of the plan is used from `update` on."""

    event: Literal["warmup_extended"]
    update: int
    warmup_updates: int
    peak_lr: float
    lr: float
    plan_sha256: str


class EarlyStopEvent(TypedDict):
    """The run ends after `update` updates, because the evaluation loss no longer improves."""

    event: Literal["early_stop"]
    update: int
    reason: str
    best_update: int
    best_loss: float


class ExportedEvent(TypedDict):
    """The checkpoint after `update` updates was exported as the one with the lowest evaluation loss.

    `note` explains why it is another one than that of the best evaluation, if it is.
    """

    event: Literal["exported_best"]
    update: int
    evaluation_loss: float | None
    note: str | None


RankEvent = CheckpointEvent | OutlierEvent | SpikeEvent | NotExtendedEvent | WarmupExtendedEvent | EarlyStopEvent
"""Events that the first rank reports."""
RunEvent = (
    StateEvent
    | OverridesEvent
    | PlanEvent
    | NodeEvent
    | SpareNodeEvent
    | NodeExcludedEvent
    | HealthEvent
    | ResumeEvent
    | RestartEvent
    | NoRestartEvent
    | CheckpointDamagedEvent
    | UploadedEvent
    | UploadFailedEvent
    | UploadGivenUpEvent
    | StopRequestedEvent
    | ContinuedEvent
    | NotContinuedEvent
    | OtherRateEvent
    | FailureEvent
    | ExportedEvent
    | RankEvent
)
"""A line of events.jsonl, without the `time` that `RunDir.event` adds at the start."""


# metrics.jsonl and evaluations.jsonl


class RouterLoss(TypedDict, total=False):
    """The part of the loss that balances the experts' routers, if the plan adds it."""

    router_loss: Number


class Utilisation(TypedDict, total=False):
    """`tflops`: TFLOP/s of one rank, if the model's are known; `mfu`: as a fraction of what its GPU can do at most."""

    tflops: float
    mfu: float


class MetricsLine(RouterLoss, Utilisation):
    """An update of the launcher's own training loop. `tokens` are the update's, without padding.

    `data_seconds` is the part of `step_seconds` in which rank 0 waited for its micro-batches.
    """

    update: int
    samples: int
    tokens: int
    loss: Number
    lr: Number
    grad_norm: Number | None
    skipped: bool
    step_seconds: float
    data_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    time: str


class ScriptMetricsLine(TypedDict):
    """An update of a script, from `launcher.report`. The script may add keys; without a value a key is missing."""

    update: int
    samples: NotRequired[int]
    loss: NotRequired[Number]
    lr: NotRequired[Number]
    tokens: NotRequired[Number]
    step_seconds: NotRequired[float]
    tokens_per_second: NotRequired[float]
    peak_memory_bytes: int
    time: str


class EvaluationLine(TypedDict):
    """The evaluation after `update` updates: mean loss over `targets` learned tokens (nats)."""

    update: int
    loss: Number
    perplexity: Number
    targets: int
    time: str


# node.json


class GpuRecord(TypedDict):
    """A GPU of a node; None is what NVML does not report."""

    index: int
    name: str | None
    memory_used_bytes: int | None
    memory_bytes: int | None
    utilization_percent: int | None


class RankRecord(TypedDict):
    """A rank of a node. `step_seconds` and `own_seconds` are medians; `own_seconds` is that of its forward passes."""

    rank: int
    local_rank: int
    pid: int
    alive: bool
    exit_code: int | None
    phase: Phase | None
    updates: int | None
    step_seconds: float | None
    own_seconds: float | None
    memory_bytes: int | None
    gpu_memory_used_bytes: int | None
    time: str | None


class NodeIdentity(TypedDict):
    """A node in an attempt, and the network interface that reaches the other nodes."""

    node_rank: int
    host: str
    address: str | None
    interface: str | None
    attempt: int


class OomKills(TypedDict, total=False):
    """How many processes the kernel killed for lack of memory, if it counts them."""

    oom_kills: int


class NodeRecord(NodeIdentity, OomKills):
    """node.json: a node's heartbeat."""

    time: str
    cpus: int
    cpu_percent: float
    memory_used_bytes: int
    memory_peak_bytes: int
    memory_bytes: int
    gpus: list[GpuRecord]
    ended: bool
    ranks: list[RankRecord]


# manifest.json, node_failures.json, stop.json and continuation.json


class ManifestFacts(TypedDict):
    """What a checkpoint is of: the progress, the plan (or revision), and the number of ranks that saved it.

    `evaluation_loss` is that of an evaluation at the same update, if it is finite. `early_stop` is the reason for which
    the run ended at this update.
    """

    world_size: int
    update: int
    samples: int
    plan_sha256: str
    evaluation_loss: NotRequired[float]
    early_stop: NotRequired[str]


class FileRecord(TypedDict):
    """A file of a checkpoint: its size in bytes, and its checksum in hexadecimal digits."""

    size: int
    sha256: str


class Manifest(ManifestFacts):
    """manifest.json of a checkpoint: all files by name, and the versions of the libraries that saved it."""

    format: int
    time: str
    versions: dict[str, str]
    files: dict[str, FileRecord]


class NodeFailures(TypedDict):
    """A host in node_failures.json: how it failed, each time; and why the run does not use it any more, if so."""

    failures: list[str]
    excluded: str | None


class StopRequest(TypedDict):
    """stop.json: `launcher cancel` asks the supervisor to stop the run, at once if `now`.

    `time_limit`: the request comes from the batch script, which Slurm warned of the time limit.
    """

    time: str
    now: bool
    by: str
    time_limit: NotRequired[bool]


class ContinuationRecord(TypedDict):
    """continuation.json: the Slurm job `job` continues the run after `continues`, the `number`-th job in a row.

    `update` is that of the newest checkpoint. `job` is None while sbatch runs.
    """

    time: str
    job: str | None
    continues: str
    number: int
    update: int

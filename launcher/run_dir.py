"""The run directory: the paths of a run's files, its state and events, and the lock of its launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Unpack, get_args

from launcher.errors import FailureCode, RunFailed
from launcher.files import (
    FOLDER_MODES,
    OutputMode,
    Record,
    append_line,
    json_number,
    read_json,
    read_lines,
    set_aside,
    utc_now,
    utc_text,
    write_atomic,
    write_json,
)
from launcher.lock import Holder, hold, read_holder
from launcher.manifest import (
    MANIFEST,
    checkpoint_fault,
    checkpoint_is_complete,
    checkpoint_number,
    read_manifest,
    replaced_folder,
    universal_folder,
    write_manifest,
)
from launcher.records import (
    EventReport,
    JobIds,
    NodeFailures,
    RunEvent,
    RunState,
    StateDetails,
    StateEvent,
    StateRecord,
    StopRequest,
)

__all__ = [
    "ATTEMPT_VARIABLE",
    "ENDED",
    "MANIFEST",
    "NODE_FILE",
    "STATES",
    "RunDir",
    "append_line",
    "checkpoint_is_complete",
    "json_number",
    "nccl_dump_prefix",
    "rank_log_name",
    "read_lines",
    "read_manifest",
    "stacks_name",
    "universal_folder",
    "utc_now",
    "utc_text",
    "write_atomic",
    "write_json",
    "write_manifest",
]

STATES: tuple[RunState, ...] = get_args(RunState)
ENDED = ("finished", "failed", "stopped")
NODE_FILE = "node.json"
ATTEMPT_VARIABLE = "LAUNCHER_ATTEMPT"
"""Names the attempt to which a rank belongs."""
_RESERVE_BYTES = 64 * 1024
_REVISION = re.compile(r"^plan\.revision-(\d+)\.json$")


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint that cannot be used, and the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name} cannot be used: {self.reason}"


@dataclass(frozen=True)
class RunDir:
    """The paths in one run directory, and the writers of its state and events."""

    path: Path

    @classmethod
    def create(cls, output_dir: Path, name: str, stamp: str | None = None, mode: OutputMode = "private") -> RunDir:
        """Creates `<output_dir>/<name>-<stamp>[-n]`, which no other caller gets. The default stamp is the present time.

        Only its owner can read it, or also its group under the mode "group": it contains private data.
        """
        stem = f"{name}-{stamp or f'{datetime.now():%Y%m%d-%H%M%S}'}"
        output_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            path = output_dir / (stem if attempt == 0 else f"{stem}-{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=FOLDER_MODES[mode])
                run = cls(path.resolve())
                run.checkpoints.mkdir(mode=FOLDER_MODES[mode])
                run.logs.mkdir(mode=FOLDER_MODES[mode])
                return run
        raise FileExistsError(f"{output_dir / stem}: a thousand runs with this name exist")

    @property
    def job_file(self) -> Path:
        return self.path / "job.yaml"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def ds_config_file(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def console_file(self) -> Path:
        """What the launcher of a run in the background prints."""
        return self.path / "console.log"

    @property
    def marks(self) -> Path:
        """Small files by which nodes check that they share this directory."""
        return self.path / ".marks"

    @property
    def cluster(self) -> Path:
        """The files by which the nodes of an allocation find each other; they exist while its Ray runs."""
        return self.path / ".cluster"

    @property
    def lock_file(self) -> Path:
        """Locked by the running launcher, and touched every few seconds: not every lock is visible on other hosts."""
        return self.path / "launcher.lock"

    @property
    def stop_file(self) -> Path:
        """A request to end the run, written by `launcher cancel` and read by the supervisor."""
        return self.path / "stop.json"

    @property
    def node_failures_file(self) -> Path:
        """How often each host failed, and which hosts the run does not use any more."""
        return self.path / "node_failures.json"

    def node_failures(self) -> dict[str, NodeFailures]:
        """The content of node_failures.json by host, without damaged entries."""
        try:
            found = read_json(self.node_failures_file) or {}
        except OSError:
            return {}
        return {host: known for host, value in found.items() if (known := _node_failures(value)) is not None}

    def excluded_nodes(self) -> dict[str, str]:
        """The hosts that the run does not use any more, each with the reason."""
        return {host: reason for host, known in self.node_failures().items() if (reason := known["excluded"])}

    @property
    def continuation_file(self) -> Path:
        """The Slurm job that continues the run after the time limit of the one before; see `records`."""
        return self.path / "continuation.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def next_plan_revision(self) -> Path:
        """The path of the next changed plan: plan.revision-<k>.json, where k is one above the highest, from 1."""
        revisions = self.plan_revisions()
        match = _REVISION.match(revisions[-1].name) if revisions else None
        return self.path / f"plan.revision-{int(match[1]) + 1 if match else 1}.json"

    def plan_revisions(self) -> list[Path]:
        """The existing plan revisions, in order; none if the run was removed."""
        try:
            paths = list(self.path.iterdir())
        except FileNotFoundError:
            return []
        found = [(int(match[1]), path) for path in paths if (match := _REVISION.match(path.name))]
        return [path for _, path in sorted(found)]

    def node_file(self, node_rank: int, host: str) -> Path:
        """The status of a node and its ranks, written by its agent every few seconds."""
        return self.node_logs(node_rank, host) / NODE_FILE

    def node_logs(self, node_rank: int, host: str) -> Path:
        return self.logs / f"node-{node_rank}-{host}"

    def spare_logs(self, host: str) -> Path:
        """The logs of a spare node, until it has ranks."""
        return self.logs / f"spare-{host}"

    @property
    def attempt_file(self) -> Path:
        """The number of the newest attempt to carry out the run; see `attempt`."""
        return self.path / "attempt.json"

    @property
    def reserve_file(self) -> Path:
        """Space for the reason of a failure on a full disk; it exists while the ranks of an attempt run."""
        return self.path / ".reserve"

    def attempt(self) -> int:
        """The number of the newest attempt: every start of the ranks in this directory counts, from 1; 0 before."""
        return self._newest_attempt()[0]

    def check_attempt(self) -> None:
        """Raises RunFailed in a rank whose attempt was given up, or whose run directory was removed.

        A rank that was cut off the network may still see the directory, to which a newer attempt writes. DeepSpeed
        would create a removed directory again.
        """
        if not self.path.is_dir():
            raise removed(self)
        own = os.environ.get(ATTEMPT_VARIABLE, "")
        if not own.isdecimal():
            return
        newest, given_up = self._newest_attempt()
        if int(own) < newest + given_up:
            follows = f", and attempt {newest} has started" if int(own) < newest else ""
            message = f"attempt {own} of the run was given up{follows}: writing nothing"
            raise RunFailed(message, code=FailureCode.ENDED)

    def _newest_attempt(self) -> tuple[int, bool]:
        """(the number of the newest attempt, 0 before the first; whether it was given up)."""
        try:
            found = read_json(self.attempt_file) or {}
        except OSError:
            return 0, False
        number = found.get("attempt")
        return (number, found.get("given_up") is True) if isinstance(number, int) else (0, False)

    def begin_attempt(self) -> int:
        """Counts a new attempt and returns its number. Ranks of earlier attempts must not write any more."""
        number = self.attempt() + 1
        write_json(self.attempt_file, {"attempt": number})
        # Not zeros: a file system that compresses would reserve nothing.
        write_atomic(self.reserve_file, os.urandom(_RESERVE_BYTES))
        return number

    def give_up_attempt(self) -> None:
        """Ranks of the attempts so far must not write any more; for `begin_attempt` their number stays the newest."""
        if number := self.attempt():
            write_json(self.attempt_file, {"attempt": number, "given_up": True})

    def release_reserve(self) -> None:
        """Gives the reserved space back, so that a failure because of a full disk can be written."""
        with contextlib.suppress(OSError):
            self.reserve_file.unlink()

    def checkpoint(self, update: int) -> Path:
        return self.checkpoints / f"update-{update}"

    def saved_checkpoint(self, update: int) -> Path:
        """The folder of a checkpoint, or of the one that it replaces, as long as only that one is complete."""
        folder = self.checkpoint(update)
        earlier = replaced_folder(folder)
        return earlier if checkpoint_is_complete(earlier) and not checkpoint_is_complete(folder) else folder

    def enter(self, state: RunState, **details: Unpack[StateDetails]) -> None:
        """Writes a new state of the run to state.json and as an event. Raises ValueError for an unknown state."""
        if state not in STATES:
            raise ValueError(f"{state!r} is not a state of a run: {', '.join(STATES)}")
        record: StateRecord = {
            "state": state,
            "since": utc_now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **_allocation(),
            **details,
        }
        write_json(self.state_file, record)
        event: StateEvent = {"event": "state", "state": state, **details}
        self.event(event)

    def event(self, event: RunEvent) -> None:
        """Appends an event to events.jsonl."""
        append_line(self.events_file, {"time": utc_now(), **event})

    def rank_event(self, report: EventReport) -> None:
        """Appends an event that a rank reported to events.jsonl."""
        append_line(self.events_file, {"time": utc_now(), "event": report["event"], **report["details"]})

    def request_stop(self, *, now: bool, time_limit: bool = False) -> None:
        """Asks the supervisor to stop the run: at once if `now`, else after this update and a checkpoint.

        `time_limit`: Slurm's time limit is near.
        """
        by = f"{os.environ.get('USER', os.getuid())}@{socket.gethostname()}"
        request: StopRequest = {"time": utc_now(), "now": now, "by": by}
        if time_limit:
            request["time_limit"] = True
        write_json(self.stop_file, request)

    def stop_request(self) -> dict[str, Any] | None:
        """The request to stop; None if it does not exist or cannot be read at the moment."""
        try:
            return read_json(self.stop_file)
        except OSError:
            return None

    def state(self) -> dict[str, Any]:
        """The content of state.json; empty before the first state, or if it cannot be read."""
        try:
            return read_json(self.state_file) or {}
        except OSError:
            return {}

    def events(self) -> list[dict[str, Any]]:
        """The events so far, without damaged lines."""
        return list(_of_kind(read_lines(self.events_file), "event", str))

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of all updates so far, without damaged lines."""
        return list(_of_kind(read_lines(self.metrics_file), "update", int))

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations so far, without damaged lines."""
        return list(_of_kind(read_lines(self.evaluations_file), "update", int))

    def damaged_lines(self) -> dict[str, int]:
        """The number of damaged lines by file name, for the files of JSON lines that have any."""
        found: dict[str, int] = {}
        for file, key, kind in (
            (self.metrics_file, "update", int),
            (self.evaluations_file, "update", int),
            (self.events_file, "event", str),
        ):
            damaged: list[bytes] = []
            records = list(read_lines(file, damaged.append))
            if count := len(damaged) + len(records) - len(list(_of_kind(records, key, kind))):
                found[file.name] = count
        return found

    def complete_checkpoints(self) -> list[int]:
        """The updates with a checkpoint whose files have the sizes in its manifest, oldest first.

        The order is by samples: the numbering of updates changes if a resume changes the batch size.
        """
        updates = {n for path in self.checkpoints.glob("update-*") if (n := checkpoint_number(path)) is not None}
        folders = {update: self.saved_checkpoint(update) for update in updates}
        manifests = {update: read_manifest(folder) for update, folder in folders.items()}
        order = sorted(
            (manifest["samples"], update)
            for update, manifest in manifests.items()
            if manifest and manifest["update"] == update and checkpoint_is_complete(folders[update])
        )
        return [update for _, update in order]

    def usable_checkpoints(self) -> list[int]:
        """The complete checkpoints in which no fault is found; their content is not read."""
        complete = self.complete_checkpoints()
        return [update for update in complete if checkpoint_fault(self.saved_checkpoint(update)) is None]

    def damaged_checkpoints(self) -> list[DamagedCheckpoint]:
        """The checkpoints that cannot be used, with the reason, in order of updates."""
        found = [(n, p) for p in self.checkpoints.glob("update-*") if (n := checkpoint_number(p)) is not None]
        return [DamagedCheckpoint(p, fault) for _, p in sorted(found) if (fault := checkpoint_fault(p)) is not None]

    def rewind(self, samples: int, update: int) -> None:
        """Removes the lines of updates after a checkpoint, which will be repeated; files *.undone-<k> keep them.

        Gives up the attempts so far: a rank that was cut off must not append the lines again.
        """
        self.give_up_attempt()

        def metrics(line: Record) -> bool:
            # A script's lines have no samples if its batch size is unknown. Updates start at 0.
            return _at_most(line, "samples", samples) if "samples" in line else _at_most(line, "update", update - 1)

        set_aside(self.metrics_file, metrics)
        set_aside(self.evaluations_file, lambda line: _at_most(line, "update", update))

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Holds the lock of the run directory inside the block; yields False if another launcher holds it."""
        with hold(self.lock_file) as held:
            yield held

    def holder(self) -> Holder | None:
        """The launcher that holds the lock, or that ended without releasing it, or None."""
        return read_holder(self.lock_file)


def removed(run: RunDir) -> RunFailed:
    """The error for a run whose directory was removed while it was running."""
    return RunFailed(f"the run directory {run.path} was removed during the run", code=FailureCode.MISSING_FILE)


def rank_log_name(rank: int, attempt: int) -> str:
    """The name of a rank's log in its node's log folder; the attempts after the first are named in it."""
    return f"rank-{rank}.log" if attempt <= 1 else f"rank-{rank}.attempt-{attempt}.log"


def stacks_name(attempt: int) -> str:
    """The name of the file with the stacks of a node's ranks, in its log folder."""
    return "stacks.txt" if attempt <= 1 else f"stacks.attempt-{attempt}.txt"


def nccl_dump_prefix(attempt: int) -> str:
    """What precedes the rank in the names of NCCL's dumps, in a node's log folder."""
    return "nccl-rank-" if attempt <= 1 else f"nccl-attempt-{attempt}-rank-"


def _node_failures(value: Any) -> NodeFailures | None:
    """An entry of node_failures.json; None if it is damaged."""
    if not isinstance(value, dict) or not isinstance(value.get("failures"), list):
        return None
    excluded = value.get("excluded")
    failures = [each for each in value["failures"] if isinstance(each, str)]
    return {"failures": failures, "excluded": excluded if isinstance(excluded, str) else None}


def _of_kind(records: Iterable[Record], key: str, kind: type) -> Iterator[Record]:
    return (record for record in records if isinstance(record.get(key), kind))


def _at_most(line: Record, key: str, last: int) -> bool:
    return isinstance(line.get(key), int) and line[key] <= last


def _allocation() -> JobIds:
    """The ids of the Slurm job and the Ray job of this process, by which other commands find the run."""
    # Ray has no shorter variable with the submission id than this one, which also contains the runtime environment.
    ray_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found: JobIds = {}
    if slurm_job_id := os.environ.get("SLURM_JOB_ID"):
        found["slurm_job_id"] = slurm_job_id
    if ray_job_id := ray_job.get("metadata", {}).get("job_submission_id"):
        found["ray_job_id"] = ray_job_id
    return found

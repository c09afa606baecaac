"""The run directory: the names of everything a run writes, and how it is written.

Whatever is replaced is replaced atomically, and whatever grows grows by whole lines, so that a reader at any moment
sees something complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STATES = (
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
)
ENDED = ("finished", "failed", "stopped")
NODE_FILE = "node.json"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_CHECKPOINT = re.compile(r"^update-(\d+)$")
_REVISION = re.compile(r"^plan\.revision-(\d+)\.json$")


def utc_now() -> str:
    """The time of this moment, as `utc_text` has it."""
    return utc_text(time.time())


def utc_text(seconds: float) -> str:
    """A time (seconds since the epoch) as every file of a run writes it: UTC, ISO 8601, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces `path` in one step, safe on disk before the old one is gone. The folder must exist.

    What need not outlast a power cut is spared the wait for the disk: `durable=False`.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, replaced atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line in a single write."""
    line = json.dumps(record, separators=(",", ":")) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text. Other values stay as they are."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole JSON lines of `path`; a half-written last line is left for later, a missing file is empty."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


@dataclass(frozen=True)
class RunDir:
    """Names inside one run directory, and the writers of its state and events."""

    path: Path

    @classmethod
    def create(cls, output_dir: Path, name: str, stamp: str | None = None) -> RunDir:
        """A new directory `<output_dir>/<name>-<stamp>[-n]`, made by exactly one caller. The stamp: date and time."""
        stem = f"{name}-{stamp or f'{datetime.now():%Y%m%d-%H%M%S}'}"
        for attempt in range(1000):
            path = output_dir / (stem if attempt == 0 else f"{stem}-{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                run = cls(path.resolve())
                run.checkpoints.mkdir()
                run.logs.mkdir()
                return run
        raise FileExistsError(f"{output_dir / stem}: a thousand runs began in this second")

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
    def marks(self) -> Path:
        """Where nodes leave small files for each other, to see that they share this directory."""
        return self.path / ".marks"

    @property
    def cluster(self) -> Path:
        """What the nodes of an allocation need to find each other; there as long as their Ray is."""
        return self.path / ".cluster"

    @property
    def lock_file(self) -> Path:
        """Locked by the launcher at work, which touches it every few seconds: not every lock is seen on other hosts."""
        return self.path / "launcher.lock"

    @property
    def stop_file(self) -> Path:
        """A request to end the run, written by `launcher cancel` and read by the supervisor."""
        return self.path / "stop.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def next_plan_revision(self) -> Path:
        """The name for plan.json as it is changed on the way once more: plan.revision-<k>.json, k from 1."""
        return self.path / f"plan.revision-{len(self.plan_revisions()) + 1}.json"

    def plan_revisions(self) -> list[Path]:
        """The revisions that there are, in order; none of a run that was removed."""
        try:
            paths = list(self.path.iterdir())
        except FileNotFoundError:
            return []
        found = [(int(match[1]), path) for path in paths if (match := _REVISION.match(path.name))]
        return [path for _, path in sorted(found)]

    def node_file(self, node_rank: int, host: str) -> Path:
        """How a node and its ranks are, written by its agent every few seconds."""
        return self.node_logs(node_rank, host) / NODE_FILE

    def node_logs(self, node_rank: int, host: str) -> Path:
        return self.logs / f"node-{node_rank}-{host}"

    def checkpoint(self, update: int) -> Path:
        return self.checkpoints / f"update-{update}"

    def enter(self, state: str, **details: Any) -> None:
        """Writes the state a run has come to, in state.json and as an event."""
        if state not in STATES:
            raise ValueError(f"{state!r} is not a state of a run: {', '.join(STATES)}")
        record = {
            "state": state,
            "since": utc_now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **_allocation(),
            **details,
        }
        write_json(self.state_file, record)
        self.event("state", state=state, **details)

    def event(self, kind: str, **details: Any) -> None:
        """Adds what happened to events.jsonl."""
        append_line(self.events_file, {"time": utc_now(), "event": kind, **details})

    def request_stop(self, *, now: bool) -> None:
        """Asks the run's supervisor, wherever it is, to end the run: after this update and a checkpoint, or at once."""
        by = f"{os.environ.get('USER', os.getuid())}@{socket.gethostname()}"
        write_json(self.stop_file, {"time": utc_now(), "now": now, "by": by})

    def stop_request(self) -> dict[str, Any] | None:
        """What was asked for, None where nothing was, or where it cannot be read at this moment."""
        try:
            request: dict[str, Any] = json.loads(self.stop_file.read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return request

    def state(self) -> dict[str, Any]:
        """What state.json says; an empty mapping before the first state."""
        try:
            state: dict[str, Any] = json.loads(self.state_file.read_text())
        except FileNotFoundError:
            return {}
        return state

    def events(self) -> list[dict[str, Any]]:
        return list(read_lines(self.events_file))

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.metrics_file))

    def evaluations(self) -> list[dict[str, Any]]:
        return list(read_lines(self.evaluations_file))

    def complete_checkpoints(self) -> list[int]:
        """Updates with a checkpoint whose manifest is there and whose files have the sizes it names, oldest first.

        Oldest by samples: the count of updates begins anew where the batch size is changed on a resume.
        """
        found = [match[0] for path in self.checkpoints.glob("update-*") if (match := _CHECKPOINT.match(path.name))]
        manifests = {name: read_manifest(self.checkpoints / name) for name in found}
        order = sorted((m["samples"], m["update"], n) for n, m in manifests.items() if m)
        return [update for _, update, name in order if checkpoint_is_complete(self.checkpoints / name)]

    def rewind(self, samples: int, update: int) -> None:
        """Sets the lines of updates beyond a checkpoint aside, in files named *.undone-<k>: they are made again."""
        self._set_aside(self.metrics_file, "samples", samples)
        self._set_aside(self.evaluations_file, "update", update)

    def _set_aside(self, path: Path, key: str, last: int) -> None:
        lines = list(read_lines(path))
        kept = [line for line in lines if line[key] <= last]
        if len(kept) == len(lines):
            return
        number = len(list(self.path.glob(f"{path.stem}.undone-*"))) + 1
        path.rename(path.with_name(f"{path.stem}.undone-{number}.jsonl"))
        write_atomic(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept))

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Holds the run directory for one launcher; yields False where another one holds it.

        Where the file system has no locks, there is nothing to be told by them, and it is taken as held.
        """
        with self.lock_file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield True


def _allocation() -> dict[str, str]:
    """The Slurm job or the Ray job that this process runs in, by which the run can be found from elsewhere."""
    # Ray gives a submitted job no shorter variable than this one, which holds its runtime environment as well.
    ray_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found = {
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "ray_job_id": ray_job.get("metadata", {}).get("job_submission_id"),
    }
    return {key: value for key, value in found.items() if value}


MANIFEST = "manifest.json"


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Names every file of a finished checkpoint with its size: written last, it is what makes a checkpoint one."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    write_json(checkpoint / MANIFEST, {"time": utc_now(), **facts, "files": files})


def universal_folder(checkpoint: Path) -> Path:
    """Where a checkpoint lies once it is converted for any world size."""
    return checkpoint.with_name(f"{checkpoint.name}-universal")


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest, or None where a checkpoint was never finished."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest


def checkpoint_is_complete(checkpoint: Path) -> bool:
    """Is every file that the manifest names there, with its size?"""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return False
    files: dict[str, int] = manifest["files"]
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == s for n, s in files.items())

"""What went wrong with a run, from its directory alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from launcher.aftermath import timed_out_headline, where
from launcher.run_dir import RunDir
from launcher.tail import last_lines
from launcher.watch.causes import HOST_MEMORY, MISSING_FILE, OOM_KILL, Cause, cause_of_signal, find_cause
from launcher.watch.failures import Failed, Failures, failures_of, log_end
from launcher.watch.nodes import places_of
from launcher.watch.plain import plain
from launcher.watch.session import Session, read_json, read_session
from launcher.watch.status import LOST, RunStatus, read_status
from launcher.watch.words import duration

_SHOWN_LINES = 20
_SEARCHED_LINES = 60
_FULL = 0.95


@dataclass(frozen=True)
class Explanation:
    """What is known: a headline, facts, the ends of logs, and the cause with its hint where it is a known one.

    `failures` is None where no rank or node is known to have failed.
    """

    headline: str
    well: bool = False
    failures: Failures | None = None
    notes: tuple[str, ...] = ()
    ends: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    cause: Cause | None = None
    evidence: tuple[str, ...] = field(default=())


def explain(run: RunDir) -> Explanation:
    """What went wrong, or that nothing did."""
    session, status = read_session(run), read_status(run, time.time())
    if status.state == LOST:
        return _of_lost(run, session, status)
    if session.name == "failed":
        return _of_failed(run, session)
    if session.name == "stopped":
        return _of_stopped(status)
    if session.name == "finished":
        return Explanation(f"nothing went wrong: it finished after {status.updates} updates", well=True)
    if session.name == "unknown":
        return Explanation("there is no state.json, so how the run stands is not known")
    return _of_live(status)


def _of_live(status: RunStatus) -> Explanation:
    heard = duration(status.silent_seconds)
    told = f"it still runs: {status.state}, update {status.updates} of {status.total_updates or '?'}"
    return Explanation(f"{told}, last heard of {heard} ago", well=True)


def _of_stopped(status: RunStatus) -> Explanation:
    cause = find_cause(status.reason)
    if cause is None:
        because = f": {status.reason}" if status.reason else ""
        return Explanation(f"nothing failed: it was stopped after {status.updates} updates{because}", well=True)
    return Explanation(f"it stopped itself after {status.updates} updates: {status.reason}", cause=cause)


def _of_failed(run: RunDir, session: Session) -> Explanation:
    reason = str(session.state.get("message") or session.state.get("reason") or "no reason was written down")
    if session.failure is not None:
        return _of_failures(run, session, failures_of(session.failure, run))
    ends = _ends([run.logs / "prepare.log"]) if session.last_phase in ("planning", "preparing") else ()
    texts = ["\n".join(lines) for _, lines in ends]
    return Explanation(f"it failed while {session.last_phase}: {reason}", ends=ends, cause=find_cause(reason, *texts))


def _of_failures(run: RunDir, session: Session, found: Failures) -> Explanation:
    first = found.first
    folder = run.node_logs(first.node_rank, first.host)
    logs = [folder / ("agent.log" if first.rank is None else f"rank-{first.rank}.log")]
    cause = _cause(run, found)
    return Explanation(
        _headline(run, session, found),
        failures=found,
        notes=tuple(_notes(found)),
        ends=_ends(logs) or _told(folder, first),
        cause=cause,
        evidence=tuple(_evidence(run, session, found, cause)),
    )


def _headline(run: RunDir, session: Session, found: Failures) -> str:
    first = found.first
    if first.rank is None:
        return f"{first.name} is lost: {first.how}"
    if found.waited:
        failed = {one.rank for one in (first, *found.followers, *found.ended)}
        places = places_of(run, session)
        return timed_out_headline(places and [place for place in places if place.rank not in failed])
    said = f": {_first_line(first.error)}" if first.error else ""
    return f"{first.name} failed first, with {first.how}{said}"


def _cause(run: RunDir, found: Failures) -> Cause | None:
    """What the first rank said of its end; where that is nothing: how it ended, the end of its log, then its node.

    A log holds warnings as well, so what a rank told of its end is not made up for from there.
    """
    first = found.first
    by_signal = OOM_KILL if first.how == "signal SIGKILL" and _oom_kills(run, first) else cause_of_signal(first.how)
    told = find_cause(first.error, first.traceback, first.how)
    if told is not None or first.told or first.how == "signal SIGKILL":
        return told or by_signal
    said = find_cause("\n".join(log_end(run, first, _SEARCHED_LINES)))
    return said or by_signal or find_cause(_node_said(run, first.node_rank, first.host))


def _node_said(run: RunDir, node_rank: int, host: str) -> str:
    folder = run.node_logs(node_rank, host)
    lines = [line for name in ("node.log", "agent.log") for line in last_lines(folder / name, _SEARCHED_LINES)]
    return "\n".join(lines)


def _notes(found: Failures) -> list[str]:
    notes = []
    if found.same:
        what = "traceback" if found.first.traceback else "error"
        notes.append(f"{_count(found.same)} failed with the same {what}: {_where(found.same)}")
    if found.waited:
        waited = (found.first, *found.followers)
        notes.append(f"{_ranks(len(waited))} waited in it for too long: {_where(waited)}")
    elif found.followers:
        notes.append(f"{_count(found.followers)} fell in a collective only afterwards: {_where(found.followers)}")
    if found.ended:
        notes.append(f"{_count(found.ended)} only ended with the run: {_where(found.ended)}")
    for other in found.others[:3]:
        notes.append(f"{other.name} failed as well, with {_first_line(other.error or other.how)}")
    if len(found.others) > 3:
        notes.append(f"{_count(found.others[3:])} failed in other ways: {_where(found.others[3:])}")
    return notes


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _count(failed: tuple[Failed, ...]) -> str:
    return _ranks(len(failed), "other rank")


def _ranks(count: int, noun: str = "rank") -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _where(failed: tuple[Failed, ...]) -> str:
    return where(one.place for one in failed)


def _evidence(run: RunDir, session: Session, found: Failures, cause: Cause | None) -> list[str]:
    """What speaks for the cause besides the words of the rank."""
    first = found.first
    lines = []
    if cause is not None and cause.name == MISSING_FILE and len(session.nodes) > 1:
        alike = {one.node_rank for one in (first, *found.same)}
        lines.append(f"so far {len(alike)} of {len(session.nodes)} nodes told of it: {_where((first, *found.same))}")
    if first.how == "signal SIGKILL" or (cause is not None and cause.name == HOST_MEMORY):
        lines += _memory(run, first)
    return lines


def _oom_kills(run: RunDir, first: Failed) -> int:
    """How many processes of the node's ranks the kernel killed for want of memory, as far as that is known."""
    return int((read_json(run.node_file(first.node_rank, first.host)) or {}).get("oom_kills") or 0)


def _memory(run: RunDir, first: Failed) -> list[str]:
    kills = _oom_kills(run, first)
    if kills:
        return [f"the kernel of {first.host} killed {kills} of the processes there for want of memory (oom_kill)"]
    record = read_json(run.node_file(first.node_rank, first.host)) or {}
    used, total = record.get("memory_used_bytes"), record.get("memory_bytes")
    if not used or not total:
        return []
    said = f"the memory of {first.host} was {used / total:.0%} used when it last told of itself"
    return [said + (", which is as good as full" if used / total >= _FULL else "")]


def _of_lost(run: RunDir, session: Session, status: RunStatus) -> Explanation:
    """Of a supervisor that vanished: the failure that it had written, or else what the nodes last said."""
    if session.failure is not None:
        known = _of_failures(run, session, failures_of(session.failure, run))
        gone = "its supervisor vanished before it had written down that the run failed"
        return replace(known, notes=(*known.notes, gone))
    host = session.state.get("host", "?")
    headline = (
        f"the run is lost: its supervisor, process {session.state.get('pid')} on {host}, vanished while "
        f"{session.name}; nothing was heard for {duration(status.silent_seconds)}"
    )
    said = [_node_said(run, node.node_rank, node.host) for node in status.nodes]
    notes = [
        f"ranks on node {node.node_rank} ({node.host}) ended with {', '.join(map(str, node.exit_codes))}"
        for node in status.nodes
        if node.exit_codes
    ]
    job = status.slurm_job_id or status.ray_job_id
    notes.append(f"the output of job {job} may say more" if job else f"the kernel log of {host} may say more (dmesg)")
    if run.complete_checkpoints():
        notes.append(f"go on with: launcher resume {run.path}")
    logs = [run.node_logs(n.node_rank, n.host) / "node.log" for n in status.nodes[:1]]
    return Explanation(headline, notes=tuple(notes), ends=_ends(logs), cause=find_cause(*said))


def _ends(logs: list[Path]) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """The last lines of each log that has any."""
    found = [(path, tuple(last_lines(path, _SHOWN_LINES))) for path in logs]
    return tuple((path, lines) for path, lines in found if lines)


def _told(folder: Path, first: Failed) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """The traceback that the rank told, for where its log is not there."""
    if not first.traceback:
        return ()
    return ((folder / f"rank-{first.rank}.log (not here; as told)", tuple(first.traceback.splitlines())),)


def why_view(why: Explanation) -> Text:
    """The explanation for a terminal. Nothing of it is markup, and control sequences are taken out."""
    view = Text(_plain(why.headline), style="green" if why.well else "bold")
    for path, lines in why.ends:
        view.append(f"\n  the end of {plain(str(path))}:", style="dim")
        for line in lines:
            view.append(f"\n    {plain(line)}", style="not bold")
    for note in (*why.notes, *why.evidence):
        view.append(f"\n  {plain(note)}", style="not bold")
    if why.cause is not None:
        view.append("\n  likely cause: ", style="bold yellow")
        view.append(why.cause.name, style="yellow")
        view.append("\n  what to do:   ", style="bold yellow")
        view.append(why.cause.hint, style="not bold")
    return view


def _plain(text: str) -> str:
    return "\n  ".join(plain(line) for line in text.splitlines())


def failed_message(run: RunDir, message: str) -> str:
    """What a run that fails says at its end: the explanation, or the message it has where no more is known."""
    try:
        session = read_session(run)
        if session.failure is not None:
            return why_view(_of_failures(run, session, failures_of(session.failure, run))).plain
    except OSError:  # a run directory that is gone may be what the run failed of
        return message
    cause = find_cause(message)
    return message if cause is None else f"{message}\n  what to do:   {cause.hint}"

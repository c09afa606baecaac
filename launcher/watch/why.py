"""What went wrong with a run, from its directory alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from launcher.errors import FailureCode, known_code
from launcher.first_failure import timed_out_headline, where
from launcher.run_dir import RunDir
from launcher.tail import last_lines
from launcher.watch import runs_without_codes
from launcher.watch.causes import Cause, cause_of_signal, find_cause
from launcher.watch.failures import Failed, Failures, failures_of, log_end
from launcher.watch.lost_launcher import cause_of_loss
from launcher.watch.memory_evidence import cause_of_kill, evidence_of_memory, memory_of
from launcher.watch.nodes import places_of
from launcher.watch.number_format import duration
from launcher.watch.own_causes import CERTAIN, cause_of
from launcher.watch.session import Session, read_session
from launcher.watch.status import LOST, RunStatus, read_status
from launcher.watch.terminal_safe import plain

_SHOWN_LINES = 20
_SEARCHED_LINES = 60
_KILLED = FailureCode.RANK_KILLED
_MISSING = (FailureCode.MISSING_FILE, FailureCode.NOT_SHARED)
_MEMORY = (FailureCode.OUT_OF_MEMORY, _KILLED)


@dataclass(frozen=True)
class Explanation:
    """What is known: a headline, facts, the ends of logs, and the cause with its hint if it is a known one.

    `failures` is None if no rank or node is known to have failed. `code` is None for a run that did not fail.
    """

    headline: str
    well: bool = False
    failures: Failures | None = None
    notes: tuple[str, ...] = ()
    ends: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    cause: Cause | None = None
    evidence: tuple[str, ...] = field(default=())
    code: FailureCode | None = None


def explain(run: RunDir) -> Explanation:
    """What went wrong, or that nothing did."""
    now = time.time()
    session, status = read_session(run), read_status(run, now)
    if status.state == LOST:
        return _of_lost(run, session, status, now)
    if session.name == "failed":
        return _of_failed(run, session)
    if session.name == "stopped":
        return _of_stopped(session, status)
    if session.name == "finished":
        return Explanation(f"nothing went wrong: it finished after {status.updates} updates", well=True)
    if session.name == "unknown":
        return Explanation("there is no state.json, so how the run stands is not known")
    return _of_live(status)


def _of_live(status: RunStatus) -> Explanation:
    heard = duration(status.silent_seconds)
    told = f"it still runs: {status.state}, update {status.updates} of {status.total_updates or '?'}"
    return Explanation(f"{told}, last heard of {heard} ago", well=True)


def _of_stopped(session: Session, status: RunStatus) -> Explanation:
    code = _written_code(session, status.reason)
    if code is FailureCode.UNKNOWN:
        because = f": {status.reason}" if status.reason else ""
        return Explanation(f"nothing failed: it was stopped after {status.updates} updates{because}", well=True)
    headline = f"it stopped itself after {status.updates} updates: {status.reason}"
    return Explanation(headline, cause=cause_of(code), code=code)


def _written_code(session: Session, *texts: str | None) -> FailureCode:
    """The code in state.json; of a run that is older than codes, that of its sentences."""
    return known_code(session.state.get("code")) or runs_without_codes.code_of(*texts)


def _of_failed(run: RunDir, session: Session) -> Explanation:
    reason = str(session.state.get("message") or session.state.get("reason") or "no reason was written down")
    if session.failure is not None:
        return _of_failures(run, session, failures_of(session.failure, run))
    ends = _ends([run.logs / "prepare.log"]) if session.last_phase in ("planning", "preparing") else ()
    texts = ["\n".join(lines) for _, lines in ends]
    code = _written_code(session, reason)
    headline, cause = f"it failed while {session.last_phase}: {reason}", cause_of(code, reason, *texts)
    return Explanation(headline, ends=ends, cause=_fitting(cause, session), code=code)


def _of_failures(run: RunDir, session: Session, found: Failures) -> Explanation:
    first = found.first
    folder = run.node_logs(first.node_rank, first.host)
    logs = [folder / ("agent.log" if first.rank is None else f"rank-{first.rank}.log")]
    cause = _fitting(_cause(run, found), session)
    return Explanation(
        _headline(run, session, found),
        failures=found,
        notes=tuple(_notes(found)),
        ends=_ends(logs) or _told(folder, first),
        cause=cause,
        evidence=tuple(_evidence(run, session, found, cause)),
        code=_code(first, cause),
    )


def _code(first: Failed, cause: Cause | None) -> FailureCode:
    """The first failure's own code, or the cause's if it says more."""
    if cause is None or cause.code is FailureCode.UNKNOWN or first.code in CERTAIN:
        return first.code
    return cause.code


def _fitting(cause: Cause | None, session: Session) -> Cause | None:
    """The cause with a hint that fits: a run's only node cannot be left out, unless Slurm or Ray can give another."""
    jobs = session.state.get("slurm_job_id") or session.state.get("ray_job_id")
    if cause is None or cause.hint_alone is None or len(session.nodes) > 1 or jobs:
        return cause
    return replace(cause, hint=cause.hint_alone)


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
    reported = cause_of(first.code, first.error, first.traceback)
    if reported is not None:
        return reported
    by_node = find_cause(_node_said(run, first.node_rank, first.host))
    if first.code is _KILLED:
        said = by_node is not None and by_node.code is FailureCode.OUT_OF_MEMORY
        return by_node if said else cause_of_kill(memory_of(run, first.node_rank, first.host))
    by_signal = cause_of_signal(first.exit_code)
    if first.told:
        return by_signal
    return find_cause("\n".join(log_end(run, first, _SEARCHED_LINES))) or by_signal or by_node


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
    """What speaks for the cause besides the message of the rank."""
    first = found.first
    lines = []
    if cause is not None and cause.code in _MISSING and len(session.nodes) > 1:
        alike = {one.node_rank for one in (first, *found.same)}
        lines.append(f"so far {len(alike)} of {len(session.nodes)} nodes told of it: {_where((first, *found.same))}")
    if first.code in _MEMORY or (cause is not None and cause.code in _MEMORY):
        lines += evidence_of_memory(memory_of(run, first.node_rank, first.host), cause)
    return lines


def _of_lost(run: RunDir, session: Session, status: RunStatus, now: float) -> Explanation:
    """Of a supervisor that vanished: the failure that it had written, or else what the nodes last wrote."""
    if session.failure is not None:
        known = _of_failures(run, session, failures_of(session.failure, run))
        gone = "its supervisor vanished before it had written down that the run failed"
        return replace(known, notes=(*known.notes, gone))
    host = session.state.get("host", "?")
    headline = (
        f"the run is lost: its supervisor, process {session.state.get('pid')} on {host}, vanished while "
        f"{session.name}; the last sign of it came {duration(status.silent_seconds)} ago"
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
        notes.append(f"continue with: launcher resume {run.path}")
    logs = [run.node_logs(n.node_rank, n.host) / "node.log" for n in status.nodes[:1]]
    cause = find_cause(*said) or cause_of_loss(run, status.nodes, now)
    code = FailureCode.SUPERVISOR_LOST if cause.code is FailureCode.UNKNOWN else cause.code
    return Explanation(headline, notes=tuple(notes), ends=_ends(logs), cause=_fitting(cause, session), code=code)


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


def failed_message(run: RunDir, message: str, code: FailureCode) -> tuple[str, FailureCode]:
    """What a run that fails prints at its end, and its code: the explanation, or its own message if no more is known.

    The code is the given one unless that of the cause says more.
    """
    try:
        session = read_session(run)
        if session.failure is not None:
            why = _of_failures(run, session, failures_of(session.failure, run))
            return why_view(why).plain, why.code or code
    except OSError:  # the run directory may be gone, and that may be why the run failed
        return message, code
    cause = _fitting(cause_of(code, message), session)
    if cause is None:
        return message, code
    return f"{message}\n  what to do:   {cause.hint}", code if cause.code is FailureCode.UNKNOWN else cause.code

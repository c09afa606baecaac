"""Explains why a run failed, from its directory only."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from launcher.errors import FailureCode, known_code
from launcher.files import last_lines
from launcher.first_failure import describe_places, timeout_headline
from launcher.run_dir import RunDir, nccl_dump_prefix, stacks_name
from launcher.watch import runs_without_codes
from launcher.watch.causes_by_code import CAUSE_BY_CODE, cause_of
from launcher.watch.causes_by_message import Cause, cause_of_signal, find_cause
from launcher.watch.failures import Failed, Failures, log_end, read_failures
from launcher.watch.lost_launcher import cause_of_loss
from launcher.watch.memory_evidence import cause_of_kill, evidence_of_memory, memory_of
from launcher.watch.node_status import rank_places
from launcher.watch.number_format import duration
from launcher.watch.run_session import Session, read_session
from launcher.watch.status import LOST, RunStatus, read_status
from launcher.watch.terminal_safe import plain

_SHOWN_LINES = 20
_SEARCHED_LINES = 60
_SHOWN_FILES = 8
_KILLED = FailureCode.RANK_KILLED
_MISSING = (FailureCode.MISSING_FILE, FailureCode.NOT_SHARED)
_MEMORY = (FailureCode.OUT_OF_MEMORY, _KILLED)


@dataclass(frozen=True)
class Explanation:
    """A headline, notes, the ends of logs, and the cause with its hint if it is known.

    `ok` is True for a run without a failure. `failures` is None if no rank or node is known to have failed. `code` is
    None for a run that did not fail.
    """

    headline: str
    ok: bool = False
    failures: Failures | None = None
    notes: tuple[str, ...] = ()
    log_ends: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    cause: Cause | None = None
    evidence: tuple[str, ...] = field(default=())
    code: FailureCode | None = None


def explain(run: RunDir) -> Explanation:
    """The explanation of a run's failure, or of a run that did not fail."""
    now = time.time()
    session, status = read_session(run), read_status(run, now)
    if status.state == LOST:
        return _explain_lost(run, session, status, now)
    if session.name == "failed":
        return _explain_failed(run, session)
    if session.name == "stopped":
        return _explain_stopped(session, status)
    if session.name == "finished":
        reason = f": {status.reason}" if status.reason else ""
        return Explanation(f"no failure: the run finished after {status.updates} updates{reason}", ok=True)
    if session.name == "unknown":
        return Explanation("the state of the run is unknown: it has no readable state.json")
    return _explain_live(status)


def _explain_live(status: RunStatus) -> Explanation:
    progress = f"{status.state}, update {status.updates} of {status.total_updates or '?'}"
    active = f"last activity {duration(status.silent_seconds)} ago"
    return Explanation(f"the run is still active: {progress}, {active}", ok=True)


def _explain_stopped(session: Session, status: RunStatus) -> Explanation:
    code = _written_code(session, status.reason)
    if code is FailureCode.UNKNOWN:
        reason = f": {status.reason}" if status.reason else ""
        headline = f"no failure: the run was stopped after {status.updates} updates{reason}"
        return Explanation(headline, ok=True, notes=_continuation_notes(session, status))
    headline = f"the run stopped itself after {status.updates} updates: {status.reason}"
    return Explanation(headline, cause=cause_of(code), code=code)


def _written_code(session: Session, *texts: str | None) -> FailureCode:
    """The code in state.json; for a run from before failure codes, the code of its messages."""
    return known_code(session.state.get("code")) or runs_without_codes.code_of(*texts)


def _explain_failed(run: RunDir, session: Session) -> Explanation:
    reason = str(session.state.get("message") or session.state.get("reason") or "no reason was written")
    if session.failure is not None:
        return _explain_failures(run, session, read_failures(session.failure, run))
    ends = _log_ends([run.logs / "prepare.log"]) if session.last_phase in ("planning", "preparing") else ()
    texts = ["\n".join(lines) for _, lines in ends]
    code = _written_code(session, reason)
    headline, cause = f"the run failed while {session.last_phase}: {reason}", cause_of(code, reason, *texts)
    fitting, notes = _with_fitting_hint(cause, session), tuple(_excluded_notes(run))
    return Explanation(headline, notes=notes, log_ends=ends, cause=fitting, code=code)


def _explain_failures(run: RunDir, session: Session, found: Failures) -> Explanation:
    first = found.first
    if first.code is FailureCode.HUNG:
        return _explain_hung(run, session, found)
    cause = _with_fitting_hint(_cause(run, found), session)
    return Explanation(
        _headline(run, session, found),
        failures=found,
        notes=(
            *_notes(found),
            *(_nccl_notes(run, first) if found.only_timeouts else ()),
            *_restart_notes(session),
            *_excluded_notes(run),
        ),
        log_ends=() if first.code is FailureCode.DISK_FULL else _end_of_log(run, first),
        cause=cause,
        evidence=tuple(_evidence(run, session, found, cause)),
        code=_code(first, cause),
    )


def _explain_hung(run: RunDir, session: Session, found: Failures) -> Explanation:
    """Explains a hang; the ends of the logs of all other ranks only show that they waited."""
    first = found.first
    stacks = _file_notes(run, "the stacks of the ranks", stacks_name(first.attempt))
    notes = [*stacks, *_nccl_notes(run, first), *_restart_notes(session), *_excluded_notes(run)]
    named = [] if first.rank is None else [run.node_logs(first.node_rank, first.host) / first.log_name]
    cause = _with_fitting_hint(cause_of(first.code), session)
    headline = f"the run hung: {first.error or first.how}"
    ends = _log_ends(named)
    return Explanation(headline, failures=found, notes=tuple(notes), log_ends=ends, cause=cause, code=first.code)


def _code(first: Failed, cause: Cause | None) -> FailureCode:
    """The first failure's code, or the cause's code if that is more specific."""
    if cause is None or cause.code is FailureCode.UNKNOWN or first.code in CAUSE_BY_CODE:
        return first.code
    return cause.code


def _with_fitting_hint(cause: Cause | None, session: Session) -> Cause | None:
    """The cause with the hint for a single node if the run has only one, and no Slurm or Ray job can give another."""
    jobs = session.state.get("slurm_job_id") or session.state.get("ray_job_id")
    if cause is None or cause.hint_single_node is None or len(session.nodes) > 1 or jobs:
        return cause
    return replace(cause, hint=cause.hint_single_node)


def _headline(run: RunDir, session: Session, found: Failures) -> str:
    first = found.first
    if first.rank is None:
        return f"{first.name} is lost: {first.how}"
    if found.only_timeouts:
        failed = {one.rank for one in (first, *found.followers, *found.terminated)}
        places = rank_places(run, session)
        return timeout_headline(places and [place for place in places if place.rank not in failed])
    error = f": {_first_line(first.error)}" if first.error else ""
    return f"{first.name} failed first, with {first.how}{error}"


def _cause(run: RunDir, found: Failures) -> Cause | None:
    """The cause in the first rank's report; without a report, from its exit, the end of its log, or its node.

    If the rank reported an error, its log is not searched: a log also contains unrelated warnings.
    """
    first = found.first
    killed = first.exit_code == -signal.SIGKILL and not first.reported
    reported = None if killed else cause_of(first.code, first.error, first.traceback)
    if reported is not None:
        return reported
    by_node = find_cause(_node_log_end(run, first.node_rank, first.host))
    if killed:
        out_of_memory = by_node is not None and by_node.code is FailureCode.OUT_OF_MEMORY
        return by_node if out_of_memory else cause_of_kill(memory_of(run, first.node_rank, first.host))
    by_signal = cause_of_signal(first.exit_code)
    if first.reported:
        return by_signal
    return find_cause("\n".join(log_end(run, first, _SEARCHED_LINES))) or by_signal or by_node


def _node_log_end(run: RunDir, node_rank: int, host: str) -> str:
    folder = run.node_logs(node_rank, host)
    lines = [line for name in ("node.log", "agent.log") for line in last_lines(folder / name, _SEARCHED_LINES)]
    return "\n".join(lines)


def _file_notes(run: RunDir, what: str, pattern: str) -> list[str]:
    """The files of all nodes' log folders that match the pattern; of many only the first."""
    files = sorted(run.logs.glob(f"node-*/{pattern}"))
    more = [f"and {len(files) - _SHOWN_FILES} more such files"] if len(files) > _SHOWN_FILES else []
    return [*(f"{what}: {path}" for path in files[:_SHOWN_FILES]), *more]


def _nccl_notes(run: RunDir, first: Failed) -> list[str]:
    """What NCCL's flight recorder wrote when a collective of this attempt timed out."""
    return _file_notes(run, "the last collectives of a rank", f"{nccl_dump_prefix(first.attempt)}*")


def _restart_notes(session: Session) -> list[str]:
    """How often the run was restarted before this failure, and why it was not restarted again."""
    notes = []
    if session.restarts:
        notes.append(f"restarted {session.restarts} time{'s' if session.restarts > 1 else ''} before this failure")
    if session.no_restart:
        notes.append(f"not restarted: {session.no_restart}")
    return notes


def _excluded_notes(run: RunDir) -> list[str]:
    """The nodes that the run does not use any more."""
    return [f"excluded from this run: {host} {reason}" for host, reason in run.excluded_nodes().items()]


def _continuation_notes(session: Session, status: RunStatus) -> tuple[str, ...]:
    """Which Slurm job continues a run after a time limit, or why none does."""
    if status.continued_by:
        return (f"Slurm job {status.continued_by} was submitted to continue it",)
    return (f"no other Slurm job continues it: {session.not_continued}",) if session.not_continued else ()


def _notes(found: Failures) -> list[str]:
    notes = []
    if found.same:
        what = "traceback" if found.first.traceback else "error"
        notes.append(f"{_count(found.same)} failed with the same {what}: {_places(found.same)}")
    if found.only_timeouts:
        waited = (found.first, *found.followers)
        notes.append(f"{_ranks(len(waited))} timed out in it: {_places(waited)}")
    elif found.followers:
        notes.append(f"{_count(found.followers)} failed because a peer was lost: {_places(found.followers)}")
    if found.terminated:
        notes.append(f"{_count(found.terminated)} ended because the run ended: {_places(found.terminated)}")
    for other in found.others[:3]:
        notes.append(f"{other.name} also failed, with {_first_line(other.error or other.how)}")
    if len(found.others) > 3:
        notes.append(f"{_count(found.others[3:])} failed in other ways: {_places(found.others[3:])}")
    return notes


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _count(failed: tuple[Failed, ...]) -> str:
    return _ranks(len(failed), "other rank")


def _ranks(count: int, noun: str = "rank") -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _places(failed: tuple[Failed, ...]) -> str:
    return describe_places(one.place for one in failed)


def _evidence(run: RunDir, session: Session, found: Failures, cause: Cause | None) -> list[str]:
    """Evidence for the cause besides the rank's message."""
    first = found.first
    lines = []
    if cause is not None and cause.code in _MISSING and len(session.nodes) > 1:
        reporting = {one.node_rank for one in (first, *found.same)}
        places = _places((first, *found.same))
        lines.append(f"{len(reporting)} of {len(session.nodes)} nodes reported it before the run ended: {places}")
    if first.code in _MEMORY or (cause is not None and cause.code in _MEMORY):
        lines += evidence_of_memory(memory_of(run, first.node_rank, first.host), cause)
    return lines


def _explain_lost(run: RunDir, session: Session, status: RunStatus, now: float) -> Explanation:
    """Explains a lost supervisor by the failure that it wrote, or else by the nodes' last reports and logs."""
    if session.failure is not None:
        known = _explain_failures(run, session, read_failures(session.failure, run))
        note = "its supervisor ended before it wrote that the run failed"
        return replace(known, notes=(*known.notes, note))
    host = session.state.get("host", "?")
    headline = (
        f"the run is lost: its supervisor, process {session.state.get('pid')} on {host}, ended unexpectedly while "
        f"{session.name}; last activity {duration(status.silent_seconds)} ago"
    )
    node_logs = [_node_log_end(run, node.node_rank, node.host) for node in status.nodes]
    notes = [
        f"ranks on node {node.node_rank} ({node.host}) ended with {', '.join(map(str, node.exit_codes))}"
        for node in status.nodes
        if node.exit_codes
    ]
    job = status.slurm_job_id or status.ray_job_id
    notes.append(f"see also the output of job {job}" if job else f"see also the kernel log of {host} (dmesg)")
    if run.complete_checkpoints():
        notes.append(f"continue with: launcher resume {run.path}")
    logs = [run.node_logs(n.node_rank, n.host) / "node.log" for n in status.nodes[:1]]
    cause = find_cause(*node_logs) or cause_of_loss(run, status.nodes, now)
    code = FailureCode.SUPERVISOR_LOST if cause.code is FailureCode.UNKNOWN else cause.code
    ends, fitting = _log_ends(logs), _with_fitting_hint(cause, session)
    return Explanation(headline, notes=tuple(notes), log_ends=ends, cause=fitting, code=code)


def _log_ends(logs: list[Path]) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """The last lines of each log that is not empty."""
    found = [(path, tuple(last_lines(path, _SHOWN_LINES))) for path in logs]
    return tuple((path, lines) for path, lines in found if lines)


def _end_of_log(run: RunDir, first: Failed) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    folder = run.node_logs(first.node_rank, first.host)
    return _log_ends([folder / first.log_name]) or _reported_traceback(folder, first)


def _reported_traceback(folder: Path, first: Failed) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """The traceback that the rank reported, for a run without its log."""
    if not first.traceback:
        return ()
    return ((folder / f"{first.log_name} (missing; as reported)", tuple(first.traceback.splitlines())),)


def why_view(why: Explanation) -> Text:
    """The explanation for a terminal, without markup or control sequences from the run's files."""
    view = Text(_plain(why.headline), style="green" if why.ok else "bold")
    for path, lines in why.log_ends:
        view.append(f"\n  the end of {plain(str(path))}:", style="dim")
        for line in lines:
            view.append(f"\n    {plain(line)}", style="not bold")
    for note in (*why.notes, *why.evidence):
        view.append(f"\n  {plain(note)}", style="not bold")
    if why.cause is not None:
        view.append("\n  likely cause: ", style="bold yellow")
        view.append(why.cause.name, style="yellow")
        view.append("\n  hint:         ", style="bold yellow")
        view.append(why.cause.hint, style="not bold")
    return view


def _plain(text: str) -> str:
    return "\n  ".join(plain(line) for line in text.splitlines())


def failed_message(run: RunDir, message: str, code: FailureCode) -> tuple[str, FailureCode]:
    """The message that a failed run prints, and its code: the explanation, or `message` if nothing more is known.

    The code is `code` unless the cause's code is more specific.
    """
    try:
        session = read_session(run)
        if session.failure is not None:
            why = _explain_failures(run, session, read_failures(session.failure, run))
            return why_view(why).plain, why.code or code
    except OSError:  # the run directory may have been removed, which may be the cause
        return message, code
    cause = _with_fitting_hint(cause_of(code, message), session)
    if cause is None:
        return message, code
    return f"{message}\n  hint: {cause.hint}", code if cause.code is FailureCode.UNKNOWN else cause.code

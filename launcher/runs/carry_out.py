"""Executing a plan in a run directory, with restarts, from placing the nodes to the summary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launcher.errors import RunFailed, code_of
from launcher.fleet.forks import ForkServer
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, Script
from launcher.prepare.cache import using
from launcher.run_dir import RunDir, removed
from launcher.runs.attempts import Attempts
from launcher.runs.console import RunConsole
from launcher.runs.failure_record import record_failure
from launcher.runs.interrupts import Interrupts
from launcher.runs.outcome import Outcome, RunResult
from launcher.runs.summary import how_to_continue, print_summary
from launcher.runs.upload import uploading
from launcher.watch.run_session import is_removed

OnStop = Callable[[Interrupts], None]


def carry_out(
    plan: Plan,
    plan_file: Path,
    directory: RunDir,
    console: RunConsole,
    start: Start | None,
    interrupts: Interrupts,
    offered: ForkServer | None = None,
    on_stop: OnStop | None = None,
) -> RunResult:
    """Runs the plan in `plan_file`, from the checkpoint of `start` if given, prints a summary, and uploads the results.

    `offered` is a fork server on this machine that may fork the ranks. `on_stop` is called if a signal or a request
    stops the run, before the uploads end. Raises RunFailed, and KeyboardInterrupt if the run is stopped at once.
    """
    with using(_cached_folders(plan)), uploading(plan, directory, console, interrupts, start) as on_rewind:
        attempts = Attempts(directory, console, interrupts, offered, on_rewind)
        try:
            result = _carry_out(attempts, plan, plan_file, directory, console, start, interrupts)
        except KeyboardInterrupt:
            if on_stop is not None:
                on_stop(interrupts)
            raise
        if on_stop is not None and result.outcome.state == "stopped" and result.outcome.reason is None:
            on_stop(interrupts)
        return result


def _cached_folders(plan: Plan) -> list[str]:
    """The folders of the plan that may be entries of a cache."""
    if isinstance(plan.workload, Script):
        return []
    data = plan.training.data
    return [plan.training.model.folder, data.train.folder, *([data.eval.folder] if data.eval else [])]


def _carry_out(
    attempts: Attempts,
    plan: Plan,
    plan_file: Path,
    directory: RunDir,
    console: RunConsole,
    start: Start | None,
    interrupts: Interrupts,
) -> RunResult:
    try:
        outcome = attempts.run(plan, plan_file, start)
    except KeyboardInterrupt:
        with suppress(OSError):
            directory.enter("stopped", reason=interrupts.reason)
        console.note(f"stopped at once. {how_to_continue(plan, directory)}")
        raise
    except (RunFailed, OSError) as error:
        from launcher.watch.why import failed_message

        if is_removed(directory):
            raise removed(directory) from None
        message, code = failed_message(directory, str(error), code_of(error))
        record_failure(directory, error, console.note, code)
        raise RunFailed(message, code=code) from None
    except BaseException as error:
        record_failure(directory, error, console.note)
        raise
    reason = interrupts.reason if outcome.state == "stopped" else None
    return ended(attempts.plan, directory, console, outcome, reason, attempts.stop_signal)


def ended(
    plan: Plan,
    directory: RunDir,
    console: RunConsole,
    outcome: Outcome,
    reason: str | None = None,
    stop_signal: int = 0,
) -> RunResult:
    """Records and prints how a run ended. `reason` is the one from outside for which it was stopped."""
    reason = outcome.reason or reason
    directory.enter(outcome.state, update=outcome.updates, reason=reason, code=outcome.code)
    print_summary(plan, directory, console, outcome)
    if outcome.state == "finished":
        return RunResult(directory.path, outcome, 0)
    # 128 + signal, as in a shell: a command that waits for a finished run must not start.
    return RunResult(directory.path, outcome, 1 if outcome.reason else 128 + stop_signal)

"""The summary at the end of a run: the updates made, the losses, and how to continue."""

from __future__ import annotations

from rich.markup import escape

from launcher.plan.schema import Plan, Script
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole, number_text
from launcher.runs.outcome import Outcome
from launcher.watch.goodput import goodput
from launcher.watch.number_format import duration


def print_summary(plan: Plan, directory: RunDir, console: RunConsole, outcome: Outcome) -> None:
    """Prints the summary of a finished or stopped run."""
    evaluations = directory.evaluations()
    console.end_progress()
    if outcome.state == "stopped":
        console.note(f"[bold yellow]stopped[/]{_progress(plan, outcome)}")
    else:
        console.note(f"[bold green]finished[/]{_progress(plan, outcome)}")
    if outcome.reason:
        console.note(f"  reason           {outcome.reason}")
    if len(evaluations) > 1:
        first, last = (number_text(evaluations[place].get("loss")) for place in (0, -1))
        console.note(f"  evaluation loss  {first} before, {last} after")
    if (found := goodput(directory)) is not None:
        time = f"{duration(found.seconds)}, of which updates took {found.share:.0%}"
        console.note(f"  time             {time}")
    note_damaged_lines(directory, console)
    console.note(f"  run directory    {directory.path}")
    if outcome.state == "stopped":
        lower = f" schedule.peak_lr={plan.learning_rate.peak_lr / 2:g}" if outcome.reason else ""
        console.note(f"  {how_to_continue(plan, directory)}{lower}")
    elif plan.job.export and not isinstance(plan.workload, Script):
        console.note(f"  exported model   {directory.export}{_exported_update(plan, directory)}")
        console.note("  load it with     AutoModelForCausalLM.from_pretrained(<exported model>)")


def note_damaged_lines(directory: RunDir, console: RunConsole) -> None:
    """Reports unreadable lines in the run's files."""
    for name, count in directory.damaged_lines().items():
        lines = "1 damaged line" if count == 1 else f"{count} damaged lines"
        console.note(f"  [yellow]note:[/] skipped {lines} of {name} (possible causes: a full disk, a crash)")


def how_to_continue(plan: Plan, directory: RunDir) -> str:
    """How to continue a stopped run: a command, or what to do instead."""
    if isinstance(plan.workload, Script):
        return "the script manages its own checkpoints: start it again with launcher exec"
    if directory.complete_checkpoints():
        return f"continue with: {_resume_command(plan, directory)} {directory.path}"
    return "no checkpoint was saved: start the run from scratch with launcher run"


def _progress(plan: Plan, outcome: Outcome) -> str:
    """How many updates were made, or nothing if this is unknown."""
    if outcome.updates is None:
        return ""
    if outcome.state == "finished":
        return f" after {outcome.updates} updates"
    saved = "" if isinstance(plan.workload, Script) else ", saved"
    return f" after update {outcome.updates} of {plan.length.total_updates}{saved}"


def _exported_update(plan: Plan, directory: RunDir) -> str:
    """Of which update the export is, and with which evaluation loss, if the job asks for the best one."""
    found = next((event for event in reversed(directory.events()) if event["event"] == "exported_best"), None)
    if plan.job.export != "best" or found is None:
        return ""
    note = f"; {found['note']}" if found.get("note") else ""
    return escape(f" (update {found.get('update')}, evaluation loss {number_text(found.get('evaluation_loss'))}{note})")


def _resume_command(plan: Plan, directory: RunDir) -> str:
    """The command that resumes a run. One that started in a Slurm allocation needs another allocation."""
    if "-slurm-" not in directory.path.name:
        return "launcher resume"
    return "launcher submit --resume" if "slurm" in plan.job.model_fields_set else "sbatch SCRIPT --resume"

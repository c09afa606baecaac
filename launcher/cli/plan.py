"""`launcher plan`: decide everything, start nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.job import placing, read_job
from launcher.plan.model import Plan
from launcher.planning import make_plan
from launcher.watch.curves import rate_lines

_GIB = 1024**3


def plan(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file."),
    overrides: list[str] = typer.Argument(None, metavar="[SECTION.KEY=VALUE]...", help="Values set over the file's."),
    as_json: bool = typer.Option(False, "--json", help="Print plan.json."),
) -> None:
    """Show what a job comes to: ranks, batches, updates, learning rate, DeepSpeed JSON, memory. Starts nothing."""
    messages = Console(stderr=True, highlight=False)
    job = read_job(job_file, overrides or ())
    with placing(job_file, overrides or ()):
        made = make_plan(job, str(job_file), lambda progress: messages.print(f"{progress['message']} …", style="dim"))
    if as_json:
        typer.echo(made.to_json(), nl=False)
    else:
        show_plan(made, Console(highlight=False))


def show_plan(made: Plan, console: Console) -> None:
    """Prints a plan for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _facts(made):
        table.add_row(name, value)
    console.print(table)
    _show_rate(made, console)
    _show_memory(made, console)
    _show_config(made, console)
    for warning in made.warnings:
        console.print(f"[yellow]note:[/] {warning}")
    console.print(f"[dim]plan {made.sha256}[/]")


def _facts(made: Plan) -> list[tuple[str, str]]:
    world, length, train, held_out = made.world, made.length, made.data.train, made.data.eval
    nodes = f"{world.nodes} node{'s' if world.nodes > 1 else ''} x {world.processes_per_node}"
    return [
        ("job", made.job.name),
        ("model", f"{made.model.model_type}, {made.model.parameters:,} parameters, {made.model.folder}"),
        (
            "world size",
            f"{world.size} ranks: {nodes} on {made.machine.device_name}, {world.backend}, {made.precision}",
        ),
        (
            "data",
            f"{train.sequences:,} sequences, {train.tokens:,} tokens, {train.targets:,} learned ({made.data.format})"
            + (f"; {held_out.sequences:,} to evaluate on" if held_out else "; nothing to evaluate on"),
        ),
        (
            "batch",
            f"{made.train_batch_size} = micro-batch {made.train_micro_batch_size_per_gpu} x accumulation "
            f"{made.gradient_accumulation_steps} x world size {world.size}",
        ),
        (
            "updates",
            f"{length.total_updates:,} in all, {length.updates_per_epoch:.1f} an epoch, "
            f"about {length.tokens_per_update:,.0f} tokens each",
        ),
    ]


def _show_rate(made: Plan, console: Console) -> None:
    first, *others = rate_lines(made)
    console.print(Text.assemble("\n", ("learning rate", "bold"), f"  {first}"))
    for line in others:
        console.print(Padding(Text(line), (0, 0, 0, 2)))


def _show_memory(made: Plan, console: Console) -> None:
    names = ("parameters", "gradients", "optimizer_states", "activations", "logits")
    parts = ", ".join(f"{name.replace('_', ' ')} {made.memory[name] / _GIB:.2f}" for name in names)
    where = "a GPU" if made.world.device == "cuda" else "a process"
    total = made.memory["device_total"] / _GIB
    console.print(f"\n[bold]memory of {where}[/]  about {total:.2f} GiB under ZeRO-{made.zero_stage}: {parts}")
    if made.memory["offloaded"]:
        console.print(f"  offloaded: {made.memory['offloaded'] / _GIB:.2f} GiB")


def _show_config(made: Plan, console: Console) -> None:
    console.print("\n[bold]DeepSpeed JSON[/]  what is filled in or altered")
    table = Table(show_header=False, box=None, padding=(0, 2))
    for change in made.ds_config_changes:
        table.add_row(change.key, f"{_short(change.before)} → {_short(change.after)}", f"[dim]{change.reason}[/]")
    console.print(table)


def _short(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"

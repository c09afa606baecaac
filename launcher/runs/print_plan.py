"""A plan printed for people: ranks, batches, updates, learning rate, memory, and changes to the DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.lr_report.curves import lr_lines
from launcher.plan.facts import ModelFacts
from launcher.plan.fit import GIB
from launcher.plan.packing import fullness
from launcher.plan.schema import Plan, Recommendation, Script, Training, World

_PARTS = (
    *("parameters", "gradients", "optimizer_states", "buffers", "activations", "logits"),
    *("update", "fragmentation", "base"),
)
_SHOWN_BYTES = GIB // 200
_WORDS = {"True": "true", "False": "false"}


def print_plan(plan: Plan, console: Console) -> None:
    """Prints a plan for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _facts(plan):
        table.add_row(name, value)
    console.print(table)
    _print_lr(plan, console)
    if isinstance(plan.workload, Training):
        _print_memory(plan, plan.workload, console)
    _print_config(plan, console)
    for warning in plan.warnings:
        console.print(f"[yellow]note:[/] {escape(warning)}")
    console.print(f"[dim]plan {plan.sha256}[/]")


def _facts(plan: Plan) -> list[tuple[str, str]]:
    if isinstance(plan.workload, Script):
        return _script_facts(plan, plan.workload)
    training, length = plan.training, plan.length
    model, data = training.model, training.data
    train, held_out = data.train, data.eval
    return [
        ("job", plan.job.name),
        ("model", f"{model.model_type}, {model.parameters:,} parameters, {model.folder}"),
        ("trained", _trained(training)),
        ("world size", _world_words(plan)),
        *_spare_nodes(plan),
        (
            "data",
            f"{train.sequences:,} sequences, {train.tokens:,} tokens, {train.targets:,} learned ({data.format})"
            + (f"; {held_out.sequences:,} for evaluation" if held_out else "; none for evaluation"),
        ),
        *_packed(training),
        ("batch", _batch_words(plan)),
        (
            "updates",
            f"{length.total_updates:,} in total, {length.updates_per_epoch:.1f} per epoch, "
            f"about {length.tokens_per_update:,.0f} tokens per update",
        ),
    ]


def _packed(training: Training) -> Iterator[tuple[str, str]]:
    job, data = training.job, training.data
    if not job.data.packing:
        return
    words = f"{data.train.bins:,} bins of {job.data.max_length:,} tokens, {fullness(job, data):.1%} full"
    if tokens := job.train.tokens_per_batch:
        words += f"; the batch is the most bins that fit in {tokens:,} tokens and that the ranks share evenly"
    yield "packed", words


def _script_facts(plan: Plan, script: Script) -> list[tuple[str, str]]:
    facts = script.model
    advised = f"; learning rate advised for {facts.model_type}, {facts.parameters:,} parameters" if facts else ""
    return [
        ("job", plan.job.name),
        ("script", " ".join(script.arguments) or "to be given: launcher exec JOB.YAML -- SCRIPT"),
        ("model, data", f"loaded by the script{advised}"),
        ("world size", _world_words(plan)),
        *_spare_nodes(plan),
        ("batch", _batch_words(plan)),
        ("updates", f"{plan.length.total_updates:,} in total, {plan.length.samples:,} samples"),
    ]


def _world_words(plan: Plan) -> str:
    world = plan.world
    nodes = f"{world.nodes} node{'s' if world.nodes > 1 else ''} x {world.processes_per_node}"
    remote = world.device == "cuda" and not plan.machine.gpus
    device = "GPUs that are not visible from this machine" if remote else plan.machine.device_name
    return f"{world.size} ranks: {nodes} on {device}, {world.backend}, {plan.precision}"


def _spare_nodes(plan: Plan) -> Iterator[tuple[str, str]]:
    if spares := plan.job.cluster.spare_nodes:
        yield "spare nodes", f"{spares}, allocated without ranks"


def _batch_words(plan: Plan) -> str:
    data = plan.job.data
    unit = " bins" if data is not None and data.packing else ""
    return (
        f"{plan.train_batch_size}{unit} = micro-batch {plan.train_micro_batch_size_per_gpu} x accumulation "
        f"{plan.gradient_accumulation_steps} x " + _group_words(plan.world)
    )


def _group_words(world: World) -> str:
    if world.sequence_parallel_size == 1:
        return f"world size {world.size}"
    groups = f"{world.data_parallel_size} group{'s' if world.data_parallel_size > 1 else ''}"
    return f"{groups} of {world.sequence_parallel_size} sequence-parallel ranks"


def _trained(training: Training) -> str:
    """Which parameters are trained, how many, and how."""
    facts, section = training.model, training.job.model
    if section.lora is not None:
        alpha = 2 * section.lora.r if section.lora.alpha == "auto" else section.lora.alpha
        trained = f"{_share(facts)} in adapters of rank {section.lora.r} (alpha {alpha:g}) on "
        trained += ", ".join(facts.adapted_modules)
    elif section.freeze:
        trained = f"{_share(facts)}; frozen: {', '.join(section.freeze)}"
    else:
        trained = "all parameters"
    switches = ("gradient_checkpointing", "torch_compile", "liger")
    return "; ".join([trained, *(name.replace("_", " ") for name in switches if getattr(section, name))])


def _share(facts: ModelFacts) -> str:
    return f"{facts.trainable_parameters:,} parameters ({facts.trainable_parameters / facts.parameters:.2%})"


def _print_lr(plan: Plan, console: Console) -> None:
    first, *others = lr_lines(plan)
    console.print(Text.assemble("\n", ("learning rate", "bold"), f"  {first}"))
    for line in others:
        console.print(Padding(Text(line), (0, 0, 0, 2)))


def _print_memory(plan: Plan, training: Training, console: Console) -> None:
    memory = training.memory
    shown = [(name.replace("_", " "), memory[name]) for name in _PARTS if memory[name] >= _SHOWN_BYTES]
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in shown)
    device = "GPU" if plan.world.device == "cuda" else "process"
    total = memory["device_total"] / GIB
    console.print(f"\n[bold]memory per {device}[/]  about {total:.2f} GiB under ZeRO-{plan.zero_stage}: {parts}")
    for name, place in (("offloaded", "in host memory"), ("on_nvme", "on NVMe")):
        if memory[name]:
            console.print(f"  per rank, also {place}: {memory[name] / GIB:.2f} GiB")
    if training.background_copy_bytes is not None:
        copied = f"{training.background_copy_bytes / GIB:.2f} GiB"
        console.print(f"  per node, for checkpoints written in the background: {copied} of host memory")
    if training.recommendation:
        _print_candidates(training.recommendation, plan.world.device, console)


def _print_candidates(found: Recommendation, device: str, console: Console) -> None:
    """Prints the presets that `deepspeed: auto` compared, with their memory."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    device_title = "GiB per GPU" if device == "cuda" else "GiB per process"
    for title in ("preset", "micro-batch", device_title, "GiB of host memory per node", ""):
        table.add_column(title, justify="left" if title in ("preset", "") else "right")
    for one in found.candidates:
        verdict = "chosen" if one.preset == found.preset else "fits" if one.fits else "does not fit"
        sizes = (f"{one.device_bytes / GIB:.2f}", f"{one.host_bytes / GIB:.2f}")
        table.add_row(one.preset, str(one.micro_batch), *sizes, verdict)
    device_room = "unknown" if found.device_room is None else f"{found.device_room / GIB:.2f}"
    table.add_row("available", "", device_room, f"{found.host_room / GIB:.2f}", "", style="dim")
    console.print(f"\n[bold]deepspeed: auto[/]  chose {found.preset}: {found.reason}")
    console.print(table)


def _print_config(plan: Plan, console: Console) -> None:
    """Prints the differences between the user's JSON and the one that DeepSpeed receives, one line per key."""
    console.print("\n[bold]DeepSpeed JSON[/]  values that are filled in or changed")
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(overflow="fold", max_width=50)
    table.add_column(overflow="fold")
    for change in plan.ds_config_changes:
        for key, before, after in _leaves(change.key, change.before, change.after):
            values = f"{_short(before, 'not set')} → {_short(after, 'removed')}"
            table.add_row(Text(key), Text(values), Text(change.reason, style="dim"))
    console.print(table)


def _leaves(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) of every value that differs, in nested blocks too."""
    if not isinstance(after, dict) and not isinstance(before, dict):
        yield key, before, after
        return
    old, new = (block if isinstance(block, dict) else {} for block in (before, after))
    if isinstance(before, dict) != isinstance(after, dict) and before is not None and after is not None:
        yield key, before, after
        return
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield from _leaves(f"{key}.{name}", old.get(name), new.get(name))


def _short(value: Any, if_none: str) -> str:
    text = (
        if_none if value is None else f"{value:.6g}" if isinstance(value, float) else _WORDS.get(str(value), str(value))
    )
    return text if len(text) <= 60 else text[:57] + "…"

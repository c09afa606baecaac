"""`launcher lint`: checks DeepSpeed JSONs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from launcher.ds_config.catalogue import Catalogue
    from launcher.ds_config.findings import Finding
    from launcher.ds_config.target import Target

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


class Devices(enum.StrEnum):
    """The values of --device."""

    CPU = "cpu"
    CUDA = "cuda"


def lint(
    files: Annotated[list[Path], typer.Argument(help="DeepSpeed JSON files.", metavar="FILE.json…")],
    fix: Annotated[bool, typer.Option("--fix", help="Write what can only be meant one way.")] = False,
    world_size: Annotated[int | None, typer.Option(help="Ranks, to check the batch sizes with.", min=1)] = None,
    device: Annotated[
        Devices | None,
        typer.Option(help="The ranks' device, which decides what DeepSpeed can do; this machine's if left out."),
    ] = None,
    script: Annotated[
        bool, typer.Option("--script", help="The JSON is for a training script of your own (launcher exec).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check DeepSpeed JSONs: misspelt and removed keys, wrong types, and combinations that fail or hurt.

    Exit status 2 where there are errors.
    """
    from launcher.ds_config.catalogue import load_catalogue
    from launcher.ds_config.loop_rules import MONITORS_AND_OPTIMIZERS
    from launcher.ds_config.target import Target
    from launcher.prepare.machine import measure_machine, missing_packages

    keys = load_catalogue()
    where = device.value if device else measure_machine().device
    missing = missing_packages(MONITORS_AND_OPTIMIZERS)
    target = Target(where, world_size, missing, script, dtype="fp32" if where == "cpu" else None)
    if keys.warning:
        typer.echo(f"warning: {keys.warning}", err=True)
    found = {str(path): _lint_file(path, fix, target, keys) for path in files}
    if json:
        typer.echo(_as_json(found))
    else:
        _print(found, where)
    if any(finding.severity == "error" for linted in found.values() for finding in linted.findings):
        raise typer.Exit(2)


@dataclass(frozen=True)
class Linted:
    """What is left to fix in a file, and what was fixed: (line, column, key, text before, text after)."""

    findings: list[Finding]
    fixed: list[tuple[int, int, str, str, str]]


def _lint_file(path: Path, fix: bool, target: Target, keys: Catalogue) -> Linted:
    """One file. One that cannot be read, or not be written, has that for a finding: the others are still told."""
    from launcher.ds_config.findings import Finding
    from launcher.errors import RequestError

    try:
        return _linted(path, fix, target, keys)
    except RequestError as error:
        problems = error.problems
        return Linted([Finding(p.line or 0, 0, "error", p.key or "", p.message, p.hint or "") for p in problems], [])
    except OSError as error:
        return Linted([Finding(0, 0, "error", "", f"cannot be written: {error.strerror}", "")], [])


def _linted(path: Path, fix: bool, target: Target, keys: Catalogue) -> Linted:
    from launcher.ds_config.findings import applicable_fixes, apply_fixes
    from launcher.ds_config.lint import lint
    from launcher.ds_config.read import parse_ds_config, read_ds_config

    config = read_ds_config(path)
    findings, fixed = lint(config, target, keys), []
    # A fixed name can show that its value needs fixing too.
    while fix and (text_after := apply_fixes(config.text or "", findings)) != config.text:
        text = config.text or ""
        for one, made in applicable_fixes(findings):
            fixed.append((one.line, one.column, one.key_path, text[made.start : made.end], made.replacement))
        config = parse_ds_config(text_after, str(path))
        findings = lint(config, target, keys)
    if fixed:
        _replace(path.resolve(), config.text or "")
    return Linted(findings, fixed)


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and moves: a reader sees the old text or the new one, and the mode stays."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.chmod(path.stat().st_mode)
    partial.replace(path)


def _as_json(found: dict[str, Linted]) -> str:
    import json
    from dataclasses import asdict

    rows: list[dict[str, Any]] = []
    for path, linted in found.items():
        for line, column, key, before, after in linted.fixed:
            place = {"file": path, "line": line, "column": column, "severity": "fixed", "key_path": key}
            rows.append({**place, "before": before, "after": after})
        rows += [{"file": path, **asdict(finding), "fix": finding.fix is not None} for finding in linted.findings]
    return json.dumps(rows, indent=2)


def _print(found: dict[str, Linted], device: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for path, linted in found.items():
        for number, _, _, before, after in linted.fixed:
            console.print(Text(f"{path}:{number}: ").append("fixed", style="green").append(f": {before} → {after}"))
        for finding in linted.findings:
            line = Text(_place(path, finding))
            line.append(finding.severity, style=COLOURS[finding.severity])
            line.append(": " + ": ".join(part for part in (finding.key_path, finding.message) if part))
            line.append(f"\n    {finding.hint}" if finding.hint else "")
            line.append(" (--fix writes it)" if finding.fix else "", style="green")
            console.print(line)
    console.print(_summary(found, device))


def _place(path: str, finding: Finding) -> str:
    """File, line and column, as far as they are known."""
    return ":".join(str(part) for part in (path, finding.line, finding.column) if part) + ": "


def _summary(found: dict[str, Linted], device: str) -> str:
    severities: list[str] = [finding.severity for linted in found.values() for finding in linted.findings]
    files = f"{len(found)} file" + ("s" if len(found) != 1 else "")
    fixed = sum(len(linted.fixed) for linted in found.values())
    prefix = f"{fixed} fixed, " if fixed else ""
    if not severities:
        return f"{files}: {prefix}nothing to fix (for {device})"
    counts = [f"{severities.count(name)} {name}" + "s" * (severities.count(name) != 1) for name in COLOURS]
    return f"{files}: {prefix}" + ", ".join(counts) + f" (for {device})"

"""`launcher lint`: checks DeepSpeed JSONs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from launcher.ds_config.catalogue import Catalogue
    from launcher.ds_config.findings import Finding

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def lint(
    files: Annotated[list[Path], typer.Argument(help="DeepSpeed JSON files.", metavar="FILE.json…")],
    fix: Annotated[bool, typer.Option("--fix", help="Write what can only be meant one way.")] = False,
    world_size: Annotated[int | None, typer.Option(help="Ranks, to check the batch sizes with.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check DeepSpeed JSONs: misspelt and removed keys, wrong types, and combinations that fail or hurt.

    Exit status 2 where there are errors.
    """
    from launcher.ds_config.catalogue import load_catalogue

    keys = load_catalogue()
    found = {str(path): _lint_file(path, fix, world_size, keys) for path in files}
    if json:
        typer.echo(_as_json(found))
    else:
        _print(found)
    if any(finding.severity == "error" for findings in found.values() for finding in findings):
        raise typer.Exit(2)


def _lint_file(path: Path, fix: bool, world_size: int | None, keys: Catalogue) -> list[Finding]:
    """The findings in one file; with `fix`, those that are left after the file was rewritten."""
    from launcher.ds_config.lint import apply_fixes, lint
    from launcher.ds_config.read import parse_ds_config, read_ds_config

    config = read_ds_config(path)
    findings = lint(config, world_size=world_size, keys=keys)
    before = config.text or ""
    # A mended name can show that its value needs mending too.
    while fix and (mended := apply_fixes(config.text or "", findings)) != config.text:
        config = parse_ds_config(mended, str(path))
        findings = lint(config, world_size=world_size, keys=keys)
    if config.text and config.text != before:
        _replace(path.resolve(), config.text)
    return findings


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and moves: a reader sees the old text or the new one, and the mode stays."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.chmod(path.stat().st_mode)
    partial.replace(path)


def _as_json(found: dict[str, list[Finding]]) -> str:
    import json
    from dataclasses import asdict

    rows: list[dict[str, Any]] = []
    for path, findings in found.items():
        rows += [{"file": path, **asdict(finding), "fix": finding.fix is not None} for finding in findings]
    return json.dumps(rows, indent=2)


def _print(found: dict[str, list[Finding]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for path, findings in found.items():
        for finding in findings:
            line = Text(f"{path}:{finding.line}:{finding.column}: ")
            line.append(finding.severity, style=COLOURS[finding.severity])
            line.append(f": {finding.key_path}: {finding.message}\n    {finding.mend}")
            line.append(" (--fix writes it)" if finding.fix else "", style="green")
            console.print(line)
    console.print(_summary(found))


def _summary(found: dict[str, list[Finding]]) -> str:
    severities: list[str] = [finding.severity for findings in found.values() for finding in findings]
    files = f"{len(found)} file" + ("s" if len(found) != 1 else "")
    if not severities:
        return f"{files}: nothing to mend"
    counts = [f"{severities.count(name)} {name}" + "s" * (severities.count(name) != 1) for name in COLOURS]
    return f"{files}: " + ", ".join(counts)

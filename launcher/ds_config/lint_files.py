"""Linting DeepSpeed JSON files, and writing the fixes that can only be meant one way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.ds_config.catalogue import Catalogue
from launcher.ds_config.findings import Finding, applicable_fixes, apply_fixes
from launcher.ds_config.lint import lint
from launcher.ds_config.read import parse_ds_config, read_ds_config
from launcher.ds_config.target import Target
from launcher.errors import RequestError


@dataclass(frozen=True)
class Linted:
    """What is left to fix in a file, and what was fixed: (line, column, key, text before, text after)."""

    findings: list[Finding]
    fixed: list[tuple[int, int, str, str, str]]


def lint_file(path: Path, target: Target, keys: Catalogue, *, fix: bool) -> Linted:
    """The findings in one file; with `fix`, what can be fixed is written. A file that cannot be read is a finding."""
    try:
        return _linted(path, fix, target, keys)
    except RequestError as error:
        problems = error.problems
        return Linted([Finding(p.line or 0, 0, "error", p.key or "", p.message, p.hint or "") for p in problems], [])
    except OSError as error:
        return Linted([Finding(0, 0, "error", "", f"cannot be written: {error.strerror}", "")], [])


def _linted(path: Path, fix: bool, target: Target, keys: Catalogue) -> Linted:
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

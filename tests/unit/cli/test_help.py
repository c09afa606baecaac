"""The help of every command: paragraphs fill the width of the terminal, and no text names internals."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

import launcher
from launcher.cli import app
from launcher.cli.help_text import reflowed
from tests.unit.inputs import command

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
WIDTHS = (50, 80, 140)
MODULES = sorted(Path(launcher.__file__).parent.rglob("*.py"))


def help_lines(name: str) -> list[str]:
    ended = command(name, "--help")
    assert (ended.status, ended.err) == (0, "")
    return [re.sub(r"\x1b\[[\d;]*m", "", line).strip() for line in ended.out.splitlines()]


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The paragraphs between the usage and the first panel, as lines."""
    start = next(number for number, line in enumerate(lines) if line.startswith("Usage:"))
    end = next(number for number, line in enumerate(lines) if line.startswith("╭"))
    blocks: list[list[str]] = [[]]
    for line in lines[start:end]:
        if line:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks[1:] if block]


def short_lines(paragraph: list[str], width: int) -> list[str]:
    """Lines before the last on which the first word of the next line would fit."""
    return [line for line, after in pairwise(paragraph) if len(line) + 1 + len(after.split()[0]) <= width]


def help_texts(name: str) -> list[str]:
    """The docstring of a command, and the help of its arguments and options."""
    texts = [COMMANDS[name].help, *(getattr(parameter, "help", None) for parameter in COMMANDS[name].params)]
    return [text for text in texts if text]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_paragraphs_fill_the_width(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = help_lines(name)
    assert max(map(len, lines)) <= width
    shown = paragraphs(lines)
    written = inspect.cleandoc(COMMANDS[name].callback.__doc__ or "").split("\n\n")
    assert [" ".join(paragraph) for paragraph in shown] == [" ".join(paragraph.split()) for paragraph in written]
    # One column of padding on each side.
    assert [short_lines(paragraph, width - 2) for paragraph in shown] == [[]] * len(shown)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_no_word_of_a_help_text_is_cut(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    printed = set(" ".join(help_lines(name)).split())
    assert {word for text in help_texts(name) for word in text.split()} <= printed


def test_a_line_that_is_broken_too_early_is_found() -> None:
    assert short_lines(["a short", "line, and a longer one", "end"], 24) == ["a short"]
    assert short_lines(["a filled line", "of words"], 15) == []


def test_help_texts_have_one_line_per_paragraph() -> None:
    assert reflowed("Do this\n    and that.\n\n    More\n    text.\n") == "Do this and that.\n\nMore text."
    assert all("\n" not in paragraph for name in COMMANDS for paragraph in help_texts(name)[0].split("\n\n"))


def internal_names() -> set[str]:
    """Private names and CamelCase class names of the package."""
    nodes = [node for module in MODULES for node in ast.walk(ast.parse(module.read_text()))]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return {name for name in defined if name.startswith("_") or re.fullmatch(r"([A-Z][a-z]+){2,}", name)}


def test_no_help_text_names_internals() -> None:
    internal = internal_names()
    assert {"RequestError", "_problem_text"} <= internal
    for name, shown in COMMANDS.items():
        assert not shown.hidden, name
        for text in [GROUP.help, *help_texts(name)]:
            assert not internal & set(re.findall(r"\w+", text)), text
            assert not re.search(r"\blauncher\.(?!report\b)\w+|\b__\w+|\bpydantic\b|\btyper\b", text), text

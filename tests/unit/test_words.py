"""The glossary: words that user-facing texts avoid, and what to write instead.

User-facing texts are the string literals and docstrings of the package, and the text files that users read or copy.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
FOLDERS = ("docs", "examples", "slurm", "cluster", "ds_configs")
SUFFIXES = {".md", ".yaml", ".yml", ".json", ".py", ".sh", ".sbatch", ".j2", ".txt", ".toml"}

GLOSSARY = (
    (r"\bmend(s|ed|ing)?\b", "fix, or hint"),
    (r"\btell(s|ing)?\b|\btold\b", "report, print, log or warn"),
    (r"\bsays? so\b|\bsaid so\b", "reports, prints or logs"),
    (r"\bbad requests?\b", "invalid input, or invalid job file"),
    (r"\bgo(es|ing)? on\b|\bwent on\b|\bgone on\b", "resume or continue"),
    (r"(?<!there )\bis no\b(?! longer\b)", "is not a"),
    (r"\bthere (is|are) none\b", "not found, or: if there is no …"),
    (r"\bheld against\b", "checked against, or compared with"),
    (r"(?<!learning )(?<!learning-)\brates?\b", "learning rate"),
    (r"\bheard\b", "received"),
    (r"\b(is|are|was|were|goes|went|falls?) silent\b|\bsilent for\b", "no heartbeat"),
    (r"\bfell\b(?! back\b)", "failed because a peer was lost"),
    (r"\b(lies|stands)\b", "is"),
    (r"\bno number\b", "NaN or Inf"),
    (r"\banew\b|\bagain from the start\b", "again, or from scratch"),
    (r"\bfor want of\b", "because of, or because … is missing"),
    (r"\bas it has it\b", "as in …"),
    (r" a rank\)", "per rank)"),
)
"""(pattern, what to write instead). A space in a pattern also matches a line break."""
EXEMPT = {"launcher/watch/runs_without_codes.py"}
"""Files whose patterns match sentences of earlier versions."""
PATTERNS = [(re.compile(pattern.replace(" ", r"\s"), re.IGNORECASE), instead) for pattern, instead in GLOSSARY]


def findings(text: str, place: str, first_line: int = 1) -> list[str]:
    """The words of a text to replace, each with file, line and replacement."""
    # Without indentation and comment signs, sentences that span lines match.
    text = re.sub(r"(?<=\n)[ \t#]+", "", text)
    return [
        f"{place}:{first_line + text.count(chr(10), 0, match.start())}: found {' '.join(match[0].split())!r}, "
        f"write: {instead}"
        for pattern, instead in PATTERNS
        for match in pattern.finditer(text)
    ]


def literals(source: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of every string literal and docstring with more than one word: others are keys and names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 1:
            yield node.lineno, node.value


def modules() -> list[Path]:
    found = sorted((ROOT / "launcher").rglob("*.py"))
    assert {place_of(module) for module in found} >= EXEMPT
    return [module for module in found if place_of(module) not in EXEMPT]


def text_files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    return [*(ROOT / name for name in FILES), *sorted(visible)]


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_strings_of_the_package_use_plain_words() -> None:
    assert len(modules()) > 200
    found = [
        finding
        for module in modules()
        for line, text in literals(module.read_text())
        for finding in findings(text, place_of(module), line)
    ]
    assert not found, "\n".join(found)


def test_files_that_users_read_use_plain_words() -> None:
    assert {place_of(path).split("/")[0] for path in text_files()} == {*FILES, *FOLDERS}
    found = [finding for path in text_files() for finding in findings(path.read_text(), place_of(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A mend is printed.", "mend"),
        ("The error says what to fix and tells the mend.", "tells"),
        ("It was told to stop.", "told"),
        ("It ends and says so.", "says so"),
        ("A bad request starts nothing.", "bad request"),
        ("The run goes on with the next update.", "goes on"),
        ("Go on\n    with launcher resume.", "Go on"),
        ("This is no job file.", "is no"),
        ("None where there is none.", "there is none"),
        ("The loss is held against the plan.", "held against"),
        ("The rate at the peak.", "rate"),
        ("Nothing was heard of the node.", "heard"),
        ("The node is silent for 30 s.", "is silent"),
        ("Ranks that only fell in a collective.", "fell"),
        ("The file lies in the run directory.", "lies"),
        ("The loss is no\n# number.", "no number"),
        ("The screen is drawn anew.", "anew"),
        ("It failed for want of memory.", "for want of"),
        ("The learning rate as it has it.", "as it has it"),
        ("Sequences (two a rank).", "a rank)"),
    ],
)
def test_each_word_is_found(text: str, found: str) -> None:
    first, *_ = [finding for finding in findings(text, "a.md") if f"found {found!r}" in finding]
    assert first.startswith("a.md:1: ") and first.partition("write: ")[2]


@pytest.mark.parametrize(
    "text",
    [
        "If there is no checkpoint, the run starts from scratch. It is no longer used.",
        "The learning\n    rate is warmed up; learning-rate schedules.",
        "A recommended amendment, based on going online, fell back to the default.",
        "One rank (a rank with a GPU) fails silently; silent_seconds counts.",
    ],
)
def test_ordinary_english_is_allowed(text: str) -> None:
    assert findings(text, "a.md") == []


def test_a_finding_names_file_line_and_replacement() -> None:
    source = '"""One line.\n\n    The launcher is told.\n"""\nkey = "told"\nhint = f"go on with {key}"\n'
    found = [finding for line, text in literals(source) for finding in findings(text, "b.py", line)]
    assert found == [
        "b.py:3: found 'told', write: report, print, log or warn",
        "b.py:6: found 'go on', write: resume or continue",
    ]

"""Help texts from docstrings."""

from __future__ import annotations

import inspect


def reflowed(docstring: str | None) -> str:
    """A command's docstring with each paragraph on one line, which the terminal wraps at its own width."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

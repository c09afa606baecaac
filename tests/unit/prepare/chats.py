"""Conversations and chat templates for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.prepare.chat_template import ChatTemplate
from launcher.prepare.conversations import Reason
from launcher.prepare.row_formats import Example, Reader

Message = dict[str, Any]
Messages = list[Message]

FOLDER = Path(__file__).parents[2] / "data/chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
"""Template source by name: each has the features of one model family."""
MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|call|>",
    "<think>",
    "</think>",
    "<s>",
    "</s>",
)
"""Added tokens of various tokenizers."""
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def template(name: str, tokens: tuple[str, ...] = MARKERS, **variables: Any) -> ChatTemplate:
    """One of TEMPLATES with the special tokens <s> and </s>."""
    return ChatTemplate(TEMPLATES[name], name, {"bos_token": "<s>", "eos_token": "</s>"}, tokens, variables)


def plain() -> ChatTemplate:
    """A minimal template, for tests that do not depend on the template."""
    return ChatTemplate(PLAIN, "plain")


def reader(name: str, kind: str = "messages", **variables: Any) -> Reader:
    return Reader(kind, template(name, **variables))


def chat(*turns: str) -> Messages:
    """Alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def learned(example: Example | Reason) -> list[str]:
    """The learned spans of an example's text."""
    assert isinstance(example, Example), example
    return [example.text[start:stop] for start, stop in example.spans]


def call(name: str = "get", arguments: Any = None, **changes: Any) -> Message:
    """An assistant turn that calls one function."""
    given = {"city": "Paris"} if arguments is None else arguments
    one = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": given}}
    return {"role": "assistant", "content": None, "tool_calls": [one], **changes}


def tool(name: str = "get", **changes: Any) -> Message:
    """The description of a function."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters, **changes}}

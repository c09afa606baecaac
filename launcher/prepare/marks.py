"""Finding where a chat template writes each piece of a conversation.

The conversation is rendered a second time with marks, characters of a private use plane that no text holds, around
every message's text and behind every tool call's name. A mark is trusted only if the marked text without its marks is
the unmarked text to the letter, so that no mark can have changed what the template does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.prepare.conversations import REASONING, Messages
from launcher.prepare.row_values import BadRow

Render = Callable[..., str]
"""render(messages, add_generation_prompt=False, tools=None) -> text"""

_PLANES = (0xF0000, 0x100000)
_ROOM = 0xFFFD
_THOUGHT = "</think>"


@dataclass(frozen=True)
class Mark:
    """A place in a message: before or after its text, behind its reasoning or behind the name of a tool call."""

    message: int
    what: str  # "start", "end", "thought", "reasoning" or "call"; "tool" for the tools, which belong to no message (-1)
    index: int = 0


@dataclass(frozen=True)
class Marked:
    """A rendered conversation: its text, where each mark is in it, and the marks whose text the template left out."""

    text: str
    places: dict[Mark, int]
    left_out: frozenset[Mark]

    def of(self, message: int) -> list[int]:
        """The places of a message's marks."""
        return [place for mark, place in self.places.items() if mark.message == message]


def marks_of(messages: Messages, tools: list[Any] | None) -> list[Mark]:
    """All places of a conversation that can carry a mark."""
    found: list[Mark] = []
    for i, message in enumerate(messages):
        if _text(message.get("content")).strip():
            found += [Mark(i, what) for _, what in _places(message["content"])]
        if any(_text(message.get(key)).strip() for key in REASONING):
            found.append(Mark(i, "reasoning"))
        found += [Mark(i, "call", k) for k in range(len(message.get("tool_calls") or []))]
    found += [Mark(-1, "tool", k) for k, tool in enumerate(tools or []) if _tool_name(tool)]
    return found


def render_marked(messages: Messages, tools: list[Any] | None, render: Render) -> Marked:
    """Renders with marks all at once; if a mark changes what the template does, with each on its own."""
    text = render(messages, tools=tools)
    marks = marks_of(messages, tools)
    alphabet = Alphabet(marks, text)
    together = alphabet.read(_tried(lambda: alphabet.render(marks, messages, tools, render)))
    if together and together[0] == text:
        return Marked(text, together[1], frozenset(set(marks) - set(together[1])))
    places: dict[Mark, int] = {}
    left_out = set()
    for mark in marks:
        alone = alphabet.read(_tried(lambda mark=mark: alphabet.render([mark], messages, tools, render)))  # type: ignore[misc]
        if alone and alone[0] == text:
            places.update(alone[1])
            if not alone[1]:
                left_out.add(mark)
    return Marked(text, places, frozenset(left_out))


class Alphabet:
    """One private character for each mark, none of which is in `text`."""

    def __init__(self, marks: list[Mark], text: str) -> None:
        if len(marks) > _ROOM:
            raise BadRow(f"a conversation of {len(marks)} pieces is too long")
        highest = max(text, default="")
        used = {ord(character) for character in text} if highest >= chr(_PLANES[0]) else set()
        free = [base for base in _PLANES if not used.intersection(range(base, base + len(marks)))]
        if not free:
            raise BadRow("the text uses both private use planes of Unicode, which are needed to find the turns")
        self.character = {mark: chr(free[0] + k) for k, mark in enumerate(marks)}
        self._mark = {character: mark for mark, character in self.character.items()}
        self._any = re.compile(f"[{chr(free[0])}-{chr(free[0] + max(0, len(marks) - 1))}]")

    def render(
        self, marks: list[Mark], messages: Messages, tools: list[Any] | None, render: Render, prompt: bool = False
    ) -> str:
        """The conversation, rendered with the characters of `marks` in it."""
        chosen = {mark: self.character[mark] for mark in marks}
        marked = [_marked_message(i, message, chosen) for i, message in enumerate(messages)]
        named = [_marked_tool(tool, chosen.get(Mark(-1, "tool", k))) for k, tool in enumerate(tools or [])]
        return render(marked, add_generation_prompt=prompt, tools=named or tools)

    def read(self, text: str | None) -> tuple[str, dict[Mark, int]] | None:
        """(text without marks, the place of each mark in it).

        It is the last place for texts, of which templates may write the beginning twice, but the first for the name of
        a tool call, which templates write again in front of the call's result.
        """
        if text is None:
            return None
        places: dict[Mark, int] = {}
        pieces: list[str] = []
        length = begin = 0
        for found in self._any.finditer(text) if self._mark else ():
            pieces.append(text[begin : found.start()])
            length += found.start() - begin
            begin = found.end()
            mark = self._mark[found.group()]
            if mark.what != "call" or mark not in places:
                places[mark] = length
        return "".join([*pieces, text[begin:]]), places


def _tried(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except BadRow:
        return None


def _marked_message(i: int, message: dict[str, Any], chosen: dict[Mark, str]) -> dict[str, Any]:
    marked = dict(message)
    content = _text(message.get("content"))
    if content.strip():
        for at, what in reversed(_places(content)):
            content = content[:at] + chosen.get(Mark(i, what), "") + content[at:]
        marked["content"] = content
    for key in REASONING:
        if (reasoning := _text(message.get(key))).strip():
            inner = reasoning.rstrip()
            marked[key] = inner + chosen.get(Mark(i, "reasoning"), "") + reasoning[len(inner) :]
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            _renamed_call(call, chosen.get(Mark(i, "call", k), "")) for k, call in enumerate(message["tool_calls"])
        ]
    return marked


def _places(content: str) -> list[tuple[int, str]]:
    """Where a text is marked, in order: at both ends of what is not white space, and behind thoughts written in it."""
    begin, stop = len(content) - len(content.lstrip()), len(content.rstrip())
    thought = len(content[: max(0, content.rfind(_THOUGHT))].rstrip())
    inner = [(thought, "thought")] if thought > begin else []
    return [(begin, "start"), *inner, (stop, "end")]


def _renamed_call(call: dict[str, Any], character: str) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": function["name"] + character}}


def _marked_tool(tool: dict[str, Any], character: str | None) -> dict[str, Any]:
    name = _tool_name(tool)
    if not character or name is None:
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": name + character}}
    return {**tool, "name": name + character}


def _tool_name(tool: Any) -> str | None:
    held = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    name = held.get("name")
    return name if isinstance(name, str) and name else None


def _text(value: Any) -> str:
    """A text field as text; the parts of a form that the template reads natively are marked by their one text."""
    return value if isinstance(value, str) else ""

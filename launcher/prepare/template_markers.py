"""Finds the position of each part of a conversation in the text that a chat template renders.

The conversation is rendered a second time with markers around every message's text and after every tool call's name.
Markers are characters that are not in the text. A marker is used only if the marked text without markers equals the
unmarked text: the marker then did not change what the template does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.prepare.conversations import REASONING, Messages
from launcher.prepare.row_values import BadRow

Render = Callable[..., str]
"""render(messages, add_generation_prompt=False, tools=None) -> text"""

_LATIN = range(0x86, 0xA0)
"""Control characters that are not white space (0x85 is), and that JSON does not escape."""
_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFD
_PRIVATE = re.compile(f"[{chr(_PLANES[0])}-{chr(0x10FFFF)}]")
_THOUGHT_END = "</think>"


class Marker(NamedTuple):
    """A marker in a message: before or after its text, after its reasoning or after the name of a tool call."""

    message: int
    kind: str  # "start", "end", "thought", "reasoning" or "call"; "tool" for the tools (message -1)
    number: int = 0


@dataclass(frozen=True)
class MarkedText:
    """A rendered conversation: its text, the position of each marker, and the markers that the template dropped."""

    text: str
    positions: dict[Marker, int]
    dropped: frozenset[Marker]


def markers_of(messages: Messages, tools: list[Any] | None) -> list[Marker]:
    """All possible markers of a conversation."""
    found: list[Marker] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content and not content.isspace():
            found += [Marker(i, what, 0) for _, what in _marker_positions(content)]
        if len(message) == 2 and content is not None:
            continue  # role and content alone
        if any(_text(message[key]).strip() for key in REASONING if key in message):
            found.append(Marker(i, "reasoning"))
        if calls := message.get("tool_calls"):
            found += [Marker(i, "call", k) for k in range(len(calls))]
    if tools:
        found += [Marker(-1, "tool", k) for k, tool in enumerate(tools) if _tool_name(tool)]
    return found


def render_marked(messages: Messages, tools: list[Any] | None, render: Render) -> tuple[MarkedText, MarkerAlphabet]:
    """Renders with all markers at once; if a marker changes what the template does, with one marker at a time."""
    text = render(messages, tools=tools)
    markers = markers_of(messages, tools)
    alphabet = MarkerAlphabet(markers, text)
    marked = _or_none(lambda: alphabet.render(markers, messages, tools, render))
    if (placed := alphabet.positions_in(marked, text)) is not None:
        return MarkedText(text, placed, frozenset(set(markers).difference(placed))), alphabet
    positions: dict[Marker, int] = {}
    dropped = set()
    for marker in markers:
        alone = alphabet.read(_or_none(lambda marker=marker: alphabet.render([marker], messages, tools, render)))  # type: ignore[misc]
        if alone and alone[0] == text:
            positions.update(alone[1])
            if not alone[1]:
                dropped.add(marker)
    return MarkedText(text, positions, frozenset(dropped)), alphabet


class MarkerAlphabet:
    """A character for each marker; none of them is in `text`.

    In ASCII texts they are control characters of Latin-1: Python then stores marked texts with a byte per character,
    and not with four.
    """

    def __init__(self, markers: list[Marker], text: str) -> None:
        if len(markers) > _PLANE_SIZE:
            raise BadRow(f"a conversation with {len(markers)} parts is too long")
        self._first = _LATIN[0] if text.isascii() and len(markers) <= len(_LATIN) else _free_base(len(markers), text)
        self.character = {marker: chr(self._first + k) for k, marker in enumerate(markers)}

    def render(
        self, markers: list[Marker], messages: Messages, tools: list[Any] | None, render: Render, prompt: bool = False
    ) -> str:
        """The conversation rendered with `markers`."""
        all_of_them = len(markers) == len(self.character)
        chosen = self.character if all_of_them else {marker: self.character[marker] for marker in markers}
        marked = [_marked_message(i, message, chosen) for i, message in enumerate(messages)]
        named = [_marked_tool(tool, chosen.get(Marker(-1, "tool", k))) for k, tool in enumerate(tools or [])]
        return render(marked, add_generation_prompt=prompt, tools=named or tools)

    def read(self, text: str | None) -> tuple[str, dict[Marker, int]] | None:
        """(text without markers, position of each marker in it).

        For texts the last position: templates may write their start twice. For the name of a tool call the first:
        templates repeat it before the call's result.
        """
        if text is None:
            return None
        markers = list(self.character)
        positions: dict[Marker, int] = {}
        pieces: list[str] = []
        length = start = 0
        pattern = f"[{chr(self._first)}-{chr(self._first + max(0, len(markers) - 1))}]"
        for found in re.finditer(pattern, text) if markers else ():
            pieces.append(text[start : found.start()])
            length += found.start() - start
            start = found.end()
            marker = markers[ord(found.group()) - self._first]
            if marker.kind != "call" or marker not in positions:
                positions[marker] = length
        return "".join([*pieces, text[start:]]), positions

    def positions_in(self, marked: str | None, text: str) -> dict[Marker, int] | None:
        """The positions that `read` returns for `marked`; None if its text without markers is not `text`.

        Fast if the markers are in the order of the conversation. Each then occurs once: what is left has no marker, as
        it is equal to `text`, which has none.
        """
        if marked is None:
            return None
        positions: dict[Marker, int] = {}
        pieces: list[str] = []
        start = 0
        for marker, character in self.character.items():
            at = marked.find(character, start)
            if at >= 0:
                pieces.append(marked[start:at])
                positions[marker] = at - len(positions)
                start = at + 1
        pieces.append(marked[start:])
        if "".join(pieces) == text:
            return positions
        read = self.read(marked)
        return read[1] if read is not None and read[0] == text else None


def _free_base(count: int, text: str) -> int:
    """The first of `count` private use characters in a row that are not in `text`. Raises BadRow."""
    used = {ord(character) for character in _PRIVATE.findall(text)}
    free = [base for base in _PLANES if not used.intersection(range(base, base + count))]
    if not free:
        raise BadRow("the text uses both private use planes of Unicode, which the launcher needs to find the turns")
    return free[0]


def _or_none(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except BadRow:
        return None


def _marked_message(i: int, message: dict[str, Any], chosen: Mapping[Any, str]) -> dict[str, Any]:
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str) and content and not content.isspace():
        pieces, start = [], 0
        for at, what in _marker_positions(content):
            pieces += [content[start:at], chosen.get((i, what, 0), "")]
            start = at
        marked["content"] = "".join([*pieces, content[start:]])
    if len(message) == 2 and content is not None:
        return marked  # role and content alone
    for key in REASONING:
        if key in message and (reasoning := _text(message[key])).strip():
            inner = reasoning.rstrip()
            marked[key] = inner + chosen.get(Marker(i, "reasoning"), "") + reasoning[len(inner) :]
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [
            _renamed_call(call, chosen.get(Marker(i, "call", k), "")) for k, call in enumerate(calls)
        ]
    return marked


def _marker_positions(content: str) -> list[tuple[int, str]]:
    """(position, kind) of the markers of a text: at both ends without white space, and after reasoning in it."""
    start = len(content) - len(content.lstrip()) if content[0].isspace() else 0
    stop = len(content.rstrip()) if content[-1].isspace() else len(content)
    closed = content.rfind(_THOUGHT_END) if _THOUGHT_END in content else -1
    thought = len(content[:closed].rstrip()) if closed > 0 else 0
    if thought > start:
        return [(start, "start"), (thought, "thought"), (stop, "end")]
    return [(start, "start"), (stop, "end")]


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
    function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    name = function.get("name")
    return name if isinstance(name, str) and name else None


def _text(value: Any) -> str:
    """A text field as text; "" for anything else."""
    return value if isinstance(value, str) else ""

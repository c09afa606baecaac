"""Finds the span of each assistant turn in a rendered conversation.

A turn is learned from the position where generation would start to the end of the turn. To find a border, the
conversation is rendered only up to there (for the end: including the turn), and the text after the last marker before
the border is compared with the same part of the whole conversation. The rest of the shorter text may differ: a template
may write earlier turns differently, merge turns, or add text at the end of a conversation. The text after a marker
depends on little more than the roles. It is cached, so most conversations are rendered only twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from launcher.prepare.conversations import Messages
from launcher.prepare.row_values import BadRow
from launcher.prepare.template_markers import MarkedText, Marker, MarkerAlphabet, Render, markers_of, render_marked

Span = tuple[int, int]
_MARKUP = r"<[^<>\s]{1,48}>|\[/?[A-Z_]+\]"
_LONGEST_KEY = 400
_BEHIND = 64
"""Characters behind the common start of two texts in which a token may end that begins inside it."""


@dataclass
class Tails:
    """The text after a marker at the end of a conversation: without and with a generation prompt."""

    plain: str
    prompted: str


@dataclass
class Turn:
    """The spans of an assistant turn.

    `closed`: a text that can be learned ends it. `unwritten`: the end of the generation prompt that is missing before
    the turn. `divided`: the template writes another message inside the turn; `spans` end before that message.
    """

    spans: list[Span]
    closed: bool
    unwritten: str = ""
    divided: bool = False


@dataclass
class Spanned:
    """A rendered conversation and its assistant turns by message index."""

    marked: MarkedText
    turns: dict[int, Turn]


@dataclass
class TurnFinder:
    """Finds assistant turns in the output of one chat template.

    `tokens` are texts that the tokenizer never splits (its added tokens): a border is never inside one.
    `generation(messages, tools)` returns the spans of the template's `{% generation %}` blocks; None if it has none.
    """

    render: Render
    tokens: Iterable[str] = ()
    generation: Callable[[Messages, list[Any] | None], list[Span]] | None = None
    _tails_cache: dict[tuple[Any, ...], Tails | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fixed = [re.escape(token) for token in sorted(self.tokens, key=len, reverse=True) if token.strip()]
        self._atom = re.compile("|".join([*fixed, _MARKUP]))

    def find(self, messages: Messages, tools: list[Any] | None, wanted: Iterable[int]) -> Spanned:
        """The turns `wanted` that can be found. Raises BadRow."""
        marked, alphabet = render_marked(messages, tools, self.render)
        whole = _Whole(messages, tools, marked, alphabet)
        generated = self.generation(messages, tools) if self.generation else None
        turns: dict[int, Turn] = {}
        for i in wanted:
            if i not in whole.placed:
                continue
            anchor, divided = whole.anchor_in(i)
            start, unwritten = self._start(whole, i)
            stop, closed = self._stop(whole, i, anchor, start)
            spans = [(start, stop)] if generated is None else self._generated(whole, i, generated, stop)
            if spans:
                turns[i] = Turn(spans, closed, unwritten, divided and generated is None)
        return Spanned(marked, turns)

    def _generated(self, whole: _Whole, i: int, blocks: list[Span], stop: int) -> list[Span]:
        """The blocks with a marker of the turn; the last is extended to the turn's end if it does not include it."""
        positions = [position for position, _, _ in whole.placed[i]]
        matching = [block for block in blocks if any(block[0] <= position <= block[1] for position in positions)]
        if matching and not whole.text[max(positions) : matching[-1][1]].strip():
            matching[-1] = (matching[-1][0], max(stop, matching[-1][1]))
        return matching

    def _start(self, whole: _Whole, i: int) -> tuple[int, str]:
        """(where the model starts to write turn `i`, the missing part of the generation prompt before it)."""
        first = whole.placed[i][0][0]
        anchor = whole.anchor_before(i, first)
        begin = whole.marked.positions[anchor] if anchor else 0
        tails = self._tails(whole, i, anchor, whole.text[begin:first]) if i else None
        if tails is None:
            return self._opening(whole, first), ""
        # The rest of the text is not compared: copying it for each turn would take long in a long conversation.
        written = whole.text[begin : max(first, begin + len(tails.prompted), begin + len(tails.plain)) + _BEHIND]
        shared = self._shared(tails.prompted, written, first - begin)
        flat = tails.prompted == tails.plain  # the template writes no generation prompt
        if shared == len(tails.prompted) and not (flat and written[shared : first - begin].strip()):
            return begin + shared, ""
        if not flat and shared > self._shared(tails.plain, tails.prompted):
            return begin + min(shared, first - begin), tails.prompted[shared:]
        if whole.messages[i - 1]["role"] == "assistant" and not self._atom.search(written, 0, first - begin):
            return begin, ""  # one turn for the template: the model writes the text between the two
        header = self._header(whole, i, anchor)
        return begin + (
            self._shared(header, whole.text[begin:], first - begin) if header is not None else first - begin
        ), ""

    def _stop(self, whole: _Whole, i: int, anchor: Marker, start: int) -> tuple[int, bool]:
        """(end of turn `i`, whether a text that can be learned closes it).

        The turn starts at `start`; `anchor` is its last marker.
        """
        last = whole.marked.positions[anchor]
        if i == len(whole.messages) - 1:
            tail = whole.text[last:]
            if self._may_end_in_a_prompt(whole.text[max(0, start - len(tail)) : start], tail):
                tail = self._without_prompt(whole, anchor, tail)
            return last + len(tail), bool(tail.strip())
        gap = whole.text[last : whole.next_after(i, last)]
        spaces = whole.spaces_after(i, gap)
        tails = self._tails(whole, i + 1, anchor, gap)
        if tails is None:
            return last + spaces, False
        before = whole.text[max(0, start - len(tails.plain)) : start]
        always = tails.plain == tails.prompted and self._may_end_in_a_prompt(before, tails.plain)
        shared = 0 if always else self._shared(tails.plain, gap, spaces)
        if shared <= spaces:
            shared = max(spaces, self._before_opener(tails.prompted, gap))
        return last + shared, bool(gap[:shared].strip())

    def _without_prompt(self, whole: _Whole, anchor: Marker, tail: str) -> str:
        """The end of the last turn without the generation prompt, for a template that always writes one."""
        tails = self._tails(whole, len(whole.messages), anchor, tail)
        if tails is None or tails.plain != tails.prompted:
            return tail
        with_question = whole.tail(self.render, [*whole.messages, {"role": "user", "content": "?"}], anchor, False)
        return tail if with_question is None else tail[: self._before_opener(tail, with_question)]

    def _may_end_in_a_prompt(self, before: str, tail: str) -> bool:
        """Whether `tail` ends with the text before the turn, as a generation prompt does.

        `before` has at least the length of `tail`, or is all of the text before the turn.
        """
        starts = (at for atom in self._atom.finditer(tail) for at in atom.span())
        return any(tail[:at].strip() and tail[at:].strip() and before.endswith(tail[at:]) for at in starts)

    def _before_opener(self, prompted: str, gap: str) -> int:
        """The end of a turn that is closed differently from the last one (gpt-oss): the part that it shares with the
        text before a generation prompt, without the token that opens the next turn."""
        shared = self._shared(prompted, gap)
        complete = shared == len(prompted) or self._atom.match(prompted, shared)
        if complete and self._atom.match(gap, shared):
            return shared
        atoms = list(self._atom.finditer(gap, 0, shared))
        return atoms[-1].start() if atoms else 0

    def _tails(self, whole: _Whole, count: int, anchor: Marker | None, near: str) -> Tails | None:
        """The text after `anchor` if only the first `count` messages are rendered; None if that fails."""
        roles = tuple(message["role"] for message in whole.messages[max(0, count - 2) : count + 1])
        # Of messages without text there is no marker: several of them may follow the anchor's message.
        place = anchor and (anchor.kind, count - anchor.message)
        key = (roles, count == 1, bool(whole.tools), place, near)
        if key in self._tails_cache:
            return self._tails_cache[key]
        plain, prompted = (whole.tail(self.render, whole.messages[:count], anchor, prompt) for prompt in (False, True))
        tails = None if plain is None or prompted is None else Tails(plain, prompted)
        if len(near) <= _LONGEST_KEY:
            self._tails_cache[key] = tails
        return tails

    def _header(self, whole: _Whole, i: int, anchor: Marker | None) -> str | None:
        """The text before an assistant turn in place of turn `i`; None if that cannot be rendered."""
        probe = [*whole.messages[:i], {"role": "assistant", "content": "?"}]
        alphabet = MarkerAlphabet(markers_of(probe, whole.tools), whole.text)
        start = Marker(i, "start")
        markers = [start] if anchor is None else [anchor, start]
        try:
            text, positions = alphabet.read(alphabet.render(markers, probe, whole.tools, self.render)) or ("", {})
        except BadRow:
            return None
        if start not in positions or (anchor is not None and anchor not in positions):
            return None
        return text[positions[anchor] if anchor else 0 : positions[start]]

    def _opening(self, whole: _Whole, first: int) -> int:
        """The start of the turn if the messages before it cannot be rendered, from the prompt of a question."""
        question: Messages = [{"role": "user", "content": "?"}]
        probe = _Whole(
            question, whole.tools, MarkedText("", {}, frozenset()), MarkerAlphabet(markers_of(question, None), "?")
        )
        marker = Marker(0, "end")
        plain, prompted = (probe.tail(self.render, question, marker, prompt) for prompt in (False, True))
        if plain is None or prompted is None:
            return first
        prompt = prompted[self._shared(plain, prompted) :]
        for length in sorted({len(prompt), *(a.end() for a in self._atom.finditer(prompt))}, reverse=True):
            at = whole.text.rfind(prompt[:length], 0, first + length) if length else -1
            if at >= 0 and (at + length <= first or at < first):
                return at + length
        return first

    def _shared(self, text: str, other: str, *allowed: int) -> int:
        """The length of the common start of `text` and `other`, up to a border between tokens.

        Borders: the end of `text`, both sides of markup, the end of a line, and the lengths `allowed`.
        """
        most = _common(text, other)
        if most == len(text):
            return most
        borders = {0, *(length for length in allowed if length <= most)}
        borders.update(at + 1 for at in range(most) if text[at] == "\n")
        inside: set[int] = set()
        for one in (text, other[: most + _BEHIND]):
            for atom in self._atom.finditer(one):
                if atom.start() > most:
                    break
                borders.update(at for at in atom.span() if at <= most)
                inside.update(range(atom.start() + 1, atom.end()))
        return max((at for at in borders if at not in inside or at in allowed), default=0)


class _Whole:
    """A rendered conversation. `placed`: (position, number, marker) of each message's markers, in this order."""

    def __init__(
        self, messages: Messages, tools: list[Any] | None, marked: MarkedText, alphabet: MarkerAlphabet
    ) -> None:
        self.messages, self.tools, self.marked, self.alphabet = messages, tools, marked, alphabet
        self.text = marked.text
        self.placed: dict[int, list[tuple[int, int, Marker]]] = {}
        in_order, message, position = True, 0, 0
        for number, (marker, at) in enumerate(marked.positions.items()):
            if marker.message < 0:
                continue  # of the tools
            self.placed.setdefault(marker.message, []).append((at, number, marker))
            in_order = in_order and marker.message >= message and at >= position
            message, position = marker.message, at
        self._in_order = in_order
        if not in_order:
            for markers in self.placed.values():
                markers.sort()

    def anchor_before(self, i: int, first: int) -> Marker | None:
        """The last marker of an earlier message before `first`."""
        if self._in_order:
            earlier = next((k for k in range(i - 1, -1, -1) if k in self.placed), None)
            return None if earlier is None else self.placed[earlier][-1][2]
        near = [one for k, placed in self.placed.items() if k < i for one in placed if one[0] <= first]
        return max(near)[2] if near else None

    def anchor_in(self, i: int) -> tuple[Marker, bool]:
        """The last marker of message `i` before a marker of another message, and whether more follow."""
        own = self.placed[i]
        if self._in_order:
            return own[-1][2], False
        others = [one[0] for k, placed in self.placed.items() if k != i for one in placed if one[0] > own[0][0]]
        before = [one for one in own if one[0] <= min(others, default=len(self.text))]
        return before[-1][2], len(before) < len(own)

    def next_after(self, i: int, last: int) -> int:
        """The first position at or after `last` of a later message's marker; else the end of the text."""
        if self._in_order:
            later = next((k for k in range(i + 1, len(self.messages)) if k in self.placed), None)
            return len(self.text) if later is None else self.placed[later][0][0]
        positions = [one[0] for k, placed in self.placed.items() if k > i for one in placed if one[0] >= last]
        return min(positions, default=len(self.text))

    def spaces_after(self, i: int, gap: str) -> int:
        """The length of the gap after message `i` that is the white space at the end of its text."""
        content = self.messages[i].get("content") or ""
        return _common(content[len(content.rstrip()) :], gap)

    def tail(self, render: Render, messages: Messages, anchor: Marker | None, prompt: bool) -> str | None:
        """The text after the marker `anchor` (all text for None) in a rendering of `messages`."""
        markers = [anchor] if anchor else []
        try:
            read = self.alphabet.read(self.alphabet.render(markers, messages, self.tools, render, prompt))
        except BadRow:
            return None
        if read is None or (anchor is not None and anchor not in read[1]):
            return None
        return read[0][read[1][anchor] :] if anchor else read[0]


def _common(text: str, other: str) -> int:
    """The length of the common start."""
    if other.startswith(text):
        return len(text)
    return next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))

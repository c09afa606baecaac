"""Which part of a rendered conversation each assistant turn is.

A turn is learned from where generation would begin to the end of the turn. Both borders are found by rendering the
conversation up to there (for the end: up to and with the turn) and comparing what follows the last mark in front of
the border with what the whole conversation has in that place. Nothing else of the shorter text has to agree, so a
template may write earlier turns otherwise, merge turns, or add text at the end of a conversation. What follows a mark
depends on the roles and on little else; it is kept, so that most conversations are rendered twice in all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from launcher.prepare.conversations import Messages
from launcher.prepare.marks import Alphabet, Mark, Marked, Render, marks_of, render_marked
from launcher.prepare.row_values import BadRow

Span = tuple[int, int]
_MARKUP = r"<[^<>\s]{1,48}>|\[/?[A-Z_]+\]"
_LONGEST_KEY = 400


@dataclass
class Tails:
    """What a template writes after a mark: at the end of a conversation, and with a generation prompt."""

    plain: str
    prompted: str


@dataclass
class Turn:
    """The spans of an assistant turn.

    `closed`: something that can be learned ends it. `unwritten`: the end of the generation prompt that is not in front
    of the turn. `divided`: the template writes another message in the middle of it; `spans` end in front of that.
    """

    spans: list[Span]
    closed: bool
    unwritten: str = ""
    divided: bool = False


@dataclass
class Spanned:
    """A rendered conversation and its assistant turns by message index."""

    marked: Marked
    turns: dict[int, Turn]


@dataclass
class TurnFinder:
    """Finds assistant turns in what one chat template writes.

    `tokens` are texts that the tokenizer never divides (its added tokens): a border is never inside of one.
    `generation(messages, tools)` gives the spans of the template's `{% generation %}` blocks; None if it has none.
    """

    render: Render
    tokens: Iterable[str] = ()
    generation: Callable[[Messages, list[Any] | None], list[Span]] | None = None
    _kept: dict[tuple[Any, ...], Tails | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fixed = [re.escape(token) for token in sorted(self.tokens, key=len, reverse=True) if token.strip()]
        self._atom = re.compile("|".join([*fixed, _MARKUP]))

    def find(self, messages: Messages, tools: list[Any] | None, wanted: Iterable[int]) -> Spanned:
        """The turns `wanted`, as far as they are found. Raises BadRow."""
        marked = render_marked(messages, tools, self.render)
        whole = _Whole(messages, tools, marked, Alphabet(marks_of(messages, tools), marked.text))
        generated = self.generation(messages, tools) if self.generation else None
        turns: dict[int, Turn] = {}
        for i in wanted:
            if not marked.of(i):
                continue
            anchor, divided = whole.anchor_in(i)
            start, unwritten = self._start(whole, i)
            stop, closed = self._stop(whole, i, anchor, start)
            spans = [(start, stop)] if generated is None else self._generated(whole, i, generated, stop)
            if spans:
                turns[i] = Turn(spans, closed, unwritten, divided and generated is None)
        return Spanned(marked, turns)

    def _generated(self, whole: _Whole, i: int, blocks: list[Span], stop: int) -> list[Span]:
        """The blocks that hold a mark of the turn; the last runs to the turn's end if the block leaves the end out."""
        places = whole.marked.of(i)
        held = [block for block in blocks if any(block[0] <= place <= block[1] for place in places)]
        if held and not whole.text[max(places) : held[-1][1]].strip():
            held[-1] = (held[-1][0], max(stop, held[-1][1]))
        return held

    def _start(self, whole: _Whole, i: int) -> tuple[int, str]:
        """(where the model begins to write turn `i`, what of the generation prompt is not in front of there)."""
        first = min(whole.marked.of(i))
        anchor = whole.anchor_before(i, first)
        begin = whole.marked.places[anchor] if anchor else 0
        written = whole.text[begin:]
        tails = self._tails(whole, i, anchor, whole.text[begin:first]) if i else None
        if tails is None:
            return self._opening(whole, first), ""
        shared = self._shared(tails.prompted, written, first - begin)
        flat = tails.prompted == tails.plain  # the template writes no generation prompt
        if shared == len(tails.prompted) and not (flat and written[shared : first - begin].strip()):
            return begin + shared, ""
        if not flat and shared > self._shared(tails.plain, tails.prompted):
            return begin + min(shared, first - begin), tails.prompted[shared:]
        if whole.messages[i - 1]["role"] == "assistant" and not self._atom.search(written, 0, first - begin):
            return begin, ""  # one turn to the template: what joins the two texts is written by the model
        header = self._header(whole, i, anchor)
        return begin + (self._shared(header, written, first - begin) if header is not None else first - begin), ""

    def _stop(self, whole: _Whole, i: int, anchor: Mark, start: int) -> tuple[int, bool]:
        """(where turn `i` ends, whether anything that can be learned closes it).

        The turn begins at `start`, and `anchor` is the last of its marks.
        """
        last, before = whole.marked.places[anchor], whole.text[:start]
        if i == len(whole.messages) - 1:
            tail = whole.text[last:]
            if self._may_end_in_a_prompt(before, tail):
                tail = self._without_prompt(whole, anchor, tail)
            return last + len(tail), bool(tail.strip())
        later = [p for m, p in whole.marked.places.items() if m.message > i and p >= last]
        gap = whole.text[last : min(later, default=len(whole.text))]
        spaces = whole.spaces_after(i, gap)
        tails = self._tails(whole, i + 1, anchor, gap)
        if tails is None:
            return last + spaces, False
        always = tails.plain == tails.prompted and self._may_end_in_a_prompt(before, tails.plain)
        shared = 0 if always else self._shared(tails.plain, gap, spaces)
        if shared <= spaces:
            shared = max(spaces, self._before_opener(tails.prompted, gap))
        return last + shared, bool(gap[:shared].strip())

    def _without_prompt(self, whole: _Whole, anchor: Mark, tail: str) -> str:
        """The end of the last turn without a generation prompt, for a template that writes one in any case."""
        tails = self._tails(whole, len(whole.messages), anchor, tail)
        if tails is None or tails.plain != tails.prompted:
            return tail
        asked = whole.tail(self.render, [*whole.messages, {"role": "user", "content": "?"}], anchor, False)
        return tail if asked is None else tail[: self._before_opener(tail, asked)]

    def _may_end_in_a_prompt(self, before: str, tail: str) -> bool:
        """Whether `tail` ends in what is in front of the turn too, which is what a generation prompt is."""
        starts = (at for atom in self._atom.finditer(tail) for at in atom.span())
        return any(tail[:at].strip() and tail[at:].strip() and before.endswith(tail[at:]) for at in starts)

    def _before_opener(self, prompted: str, gap: str) -> int:
        """The end of a turn that is closed otherwise than the last (gpt-oss): what it shares with the text in front of
        a generation prompt, without the token that opens the next turn."""
        shared = self._shared(prompted, gap)
        complete = shared == len(prompted) or self._atom.match(prompted, shared)
        if complete and self._atom.match(gap, shared):
            return shared
        atoms = list(self._atom.finditer(gap, 0, shared))
        return atoms[-1].start() if atoms else 0

    def _tails(self, whole: _Whole, count: int, anchor: Mark | None, near: str) -> Tails | None:
        """What follows `anchor` when only the first `count` messages are rendered; None if they cannot be."""
        roles = tuple(message["role"] for message in whole.messages[max(0, count - 2) : count + 1])
        kept = (roles, count == 1, bool(whole.tools), anchor and anchor.what, near)
        if kept in self._kept:
            return self._kept[kept]
        plain, prompted = (whole.tail(self.render, whole.messages[:count], anchor, prompt) for prompt in (False, True))
        tails = None if plain is None or prompted is None else Tails(plain, prompted)
        if len(near) <= _LONGEST_KEY:
            self._kept[kept] = tails
        return tails

    def _header(self, whole: _Whole, i: int, anchor: Mark | None) -> str | None:
        """What stands before the text of an assistant turn that takes the place of turn `i`."""
        probe = [*whole.messages[:i], {"role": "assistant", "content": "?"}]
        alphabet = Alphabet(marks_of(probe, whole.tools), whole.text)
        start = Mark(i, "start")
        marks = [start] if anchor is None else [anchor, start]
        try:
            text, places = alphabet.read(alphabet.render(marks, probe, whole.tools, self.render)) or ("", {})
        except BadRow:
            return None
        if start not in places or (anchor is not None and anchor not in places):
            return None
        return text[places[anchor] if anchor else 0 : places[start]]

    def _opening(self, whole: _Whole, first: int) -> int:
        """Where the turn begins if nothing in front of it can be rendered: the prompt is taken from a question."""
        question: Messages = [{"role": "user", "content": "?"}]
        probe = _Whole(question, whole.tools, Marked("", {}, frozenset()), Alphabet(marks_of(question, None), "?"))
        mark = Mark(0, "end")
        plain, prompted = (probe.tail(self.render, question, mark, prompt) for prompt in (False, True))
        if plain is None or prompted is None:
            return first
        prompt = prompted[self._shared(plain, prompted) :]
        for length in sorted({len(prompt), *(a.end() for a in self._atom.finditer(prompt))}, reverse=True):
            at = whole.text.rfind(prompt[:length], 0, first + length) if length else -1
            if at >= 0 and (at + length <= first or at < first):
                return at + length
        return first

    def _shared(self, text: str, other: str, *allowed: int) -> int:
        """How much of its beginning `text` shares with `other`, up to a border between tokens.

        Borders: the end of `text`, either side of markup, the end of a line, and the lengths `allowed`.
        """
        most = _common(text, other)
        if most == len(text):
            return most
        borders = {0, *(length for length in allowed if length <= most)}
        borders.update(at + 1 for at in range(most) if text[at] == "\n")
        inside: set[int] = set()
        for one in (text, other[: most + 64]):
            for atom in self._atom.finditer(one):
                if atom.start() > most:
                    break
                borders.update(at for at in atom.span() if at <= most)
                inside.update(range(atom.start() + 1, atom.end()))
        return max((at for at in borders if at not in inside or at in allowed), default=0)


@dataclass
class _Whole:
    messages: Messages
    tools: list[Any] | None
    marked: Marked
    alphabet: Alphabet

    @property
    def text(self) -> str:
        return self.marked.text

    def anchor_before(self, i: int, first: int) -> Mark | None:
        """The last mark of an earlier message before `first`."""
        earlier = [(place, k) for k, (m, place) in enumerate(self.marked.places.items()) if 0 <= m.message < i]
        near = [(place, k) for place, k in earlier if place <= first]
        return list(self.marked.places)[max(near)[1]] if near else None

    def anchor_in(self, i: int) -> tuple[Mark, bool]:
        """The last mark of message `i` before any mark of another message, and whether there are more behind."""
        own = sorted((place, k) for k, (m, place) in enumerate(self.marked.places.items()) if m.message == i)
        first = own[0][0]
        others = [place for m, place in self.marked.places.items() if m.message not in (i, -1) and place > first]
        before = [one for one in own if one[0] <= min(others, default=len(self.text))]
        return list(self.marked.places)[before[-1][1]], len(before) < len(own)

    def spaces_after(self, i: int, gap: str) -> int:
        """How much of the gap behind the text of message `i` is the white space that the text ends with."""
        content = self.messages[i].get("content") or ""
        return _common(content[len(content.rstrip()) :], gap)

    def tail(self, render: Render, messages: Messages, anchor: Mark | None, prompt: bool) -> str | None:
        """What follows the mark `anchor` (all text for None) in a rendering of `messages`."""
        marks = [anchor] if anchor else []
        try:
            read = self.alphabet.read(self.alphabet.render(marks, messages, self.tools, render, prompt))
        except BadRow:
            return None
        if read is None or (anchor is not None and anchor not in read[1]):
            return None
        return read[0][read[1][anchor] :] if anchor else read[0]


def _common(text: str, other: str) -> int:
    """The length of the beginning that both share."""
    if other.startswith(text):
        return len(text)
    return next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))

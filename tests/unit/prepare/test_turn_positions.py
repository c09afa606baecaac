"""The fast ways to find markers and turns give what the general ones do, in every chat template."""

from __future__ import annotations

import random
from typing import Any

import pytest

from launcher.prepare import template_markers
from launcher.prepare.row_formats import Example
from launcher.prepare.row_values import BadRow
from launcher.prepare.template_markers import MarkerAlphabet
from launcher.prepare.turn_spans import _Whole
from tests.unit.prepare.chats import TEMPLATES, Messages, call, reader, tool

WORDS = (
    "alpha",
    "beta\n",
    "  gamma",
    "<think>",
    "</think>",
    "<|im_end|>",
    "[INST]",
    "\n\n",
    "?",
    '{"a": 1}',
    "assistant",
    " ",
)
OTHER_WORDS = ("é — 漢字", "\U0001f600", "\U000f0001", "\x86")
ROWS = 60


def rows(seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [_row(draw) for _ in range(ROWS)]


def _row(draw: random.Random) -> dict[str, Any]:
    words = WORDS if draw.random() < 0.6 else WORDS + OTHER_WORDS

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.choice((0, 1, 2, 4))))

    messages: Messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
    called = False
    for _ in range(draw.choice((1, 2, 3, 6))):
        kind = draw.random()
        if kind < 0.7:
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
            if draw.random() < 0.2:
                messages[-1]["reasoning_content"] = text()
        elif kind < 0.85:
            called = True
            messages += [{"role": "user", "content": text()}, call(content=draw.choice((None, text())))]
            messages += [{"role": "tool", "content": text(), "name": "get", "tool_call_id": "abcdefghi"}]
        else:
            messages.append({"role": draw.choice(("user", "assistant")), "content": text()})
    return {"messages": messages, **({"tools": [tool()]} if called and draw.random() < 0.7 else {})}


def found(name: str, seed: int) -> list[Any]:
    """What each row gives with a fresh reader."""
    read = reader(name).read
    results: list[Any] = []
    for row in rows(seed):
        try:
            one = read(row)
        except BadRow as error:
            results.append(str(error))
            continue
        if isinstance(one, Example):
            one = (one.text, one.spans, one.partly, one.shortened, one.open_ended, one.unwritten)
        results.append(one)
    return results


def by_reading(alphabet: MarkerAlphabet, marked: str | None, text: str) -> Any:
    read = alphabet.read(marked)
    return read[1] if read is not None and read[0] == text else None


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_those_of_the_general_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = found(name, 1)
    monkeypatch.setattr(MarkerAlphabet, "positions_in", by_reading)
    monkeypatch.setattr(template_markers, "_LATIN", range(0))
    prepare = _Whole.__init__

    def out_of_order(whole: _Whole, *given: Any) -> None:
        prepare(whole, *given)
        whole._in_order = False

    monkeypatch.setattr(_Whole, "__init__", out_of_order)
    assert found(name, 1) == fast
    assert sum(isinstance(one, tuple) for one in fast) > ROWS // 5


def test_a_marker_that_is_written_twice_is_found_by_the_general_way() -> None:
    from launcher.prepare.template_markers import Marker

    start, stop = Marker(0, "start"), Marker(0, "end")
    alphabet = MarkerAlphabet([start, stop], "title: ab, ab")
    first, last = (alphabet.character[marker] for marker in (start, stop))
    marked = f"title: {first}ab{last}, {first}ab{last}"
    assert alphabet.positions_in(marked, "title: ab, ab") == {start: 11, stop: 13}
    assert alphabet.positions_in(f"{last}title{first}: ab, ab", "title: ab, ab") == {stop: 0, start: 5}
    assert alphabet.positions_in(f"{first}title: ab, ab", "title: ab, ab") == {start: 0}
    assert alphabet.positions_in(f"{first}title: ab", "title: ab, ab") is None

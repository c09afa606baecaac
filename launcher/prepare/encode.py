"""Tokenises text with learned spans: token ids and a mask of the learned tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.prepare.row_formats import Example
from launcher.prepare.text_tokenizer import TextTokenizer, text_tokenizer

Piece = tuple[str, int]
Tokens = list[int]
LONGEST_TEXT = 1 << 20
"""Longer texts are tokenised in chunks of half that many characters, or a little more."""
_BETWEEN_WORDS = re.compile(r"\w\s\w")
_AROUND, _TRIED_CUTS = 2000, 100
_BITS = (b"\0", b"\1")


@dataclass(frozen=True)
class Encoded:
    """Sequences of (token ids, 1 for each learned token) of at most max_length; `cut`: tokens were dropped."""

    sequences: list[tuple[Tokens, bytes]]
    cut: bool


class Encoder:
    """Tokenises examples with a fast tokenizer of transformers, or a `TextTokenizer`.

    Learned and other text is tokenised separately. No token crosses the border, whatever white space is there, and
    training sees the same tokens as inference: the prompt tokenised alone, then the model's output. A tokenizer that
    adds a space before every text (SentencePiece) tokenises the text as a whole, and in pieces only if a token would
    cross a border.

    `divide`: split texts longer than max_length into several sequences (plain text); otherwise truncate them.
    """

    def __init__(self, tokenizer: Any, max_length: int, divide: bool) -> None:
        self.tokenizer: TextTokenizer = text_tokenizer(tokenizer)
        self.max_length, self.divide = max_length, divide
        self.end = self.tokenizer.eos_token_id
        self.before, self.after = self._added()
        self.in_pieces = self._plain("\na") == [*self._plain("\n"), *self._plain("a")]

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The tokens of each example."""
        examples = [self._stripped(example) for example in examples]
        masked = self._by_pieces(examples) if self.in_pieces else [self._whole(example) for example in examples]
        return [self._sequences(*self._ended(example, *one)) for example, one in zip(examples, masked, strict=True)]

    def _stripped(self, example: Example) -> Example:
        """The example without white space after a final end-of-text token in the text."""
        end = self.tokenizer.eos_token
        text = example.text.rstrip()
        if example.complete or not end or not text.endswith(end) or text == example.text:
            return example
        return Example(text, tuple((start, min(stop, len(text))) for start, stop in example.spans))

    def _by_pieces(self, examples: Sequence[Example]) -> list[tuple[Tokens, bytes]]:
        divided = [list(_pieces(example)) for example in examples]
        texts = [text for pieces in divided for text, _ in pieces]
        ids = iter(self.tokenizer.ids([text for text in texts if len(text) <= LONGEST_TEXT]))
        found = []
        for pieces in divided:
            tokens: Tokens = []
            learned = b""
            for text, bit in pieces:
                piece = next(ids) if len(text) <= LONGEST_TEXT else self._long(text)
                tokens += piece
                learned += _BITS[bit] * len(piece)
            found.append((tokens, learned))
        return found

    def _long(self, text: str) -> Tokens:
        """The tokens of a long text, tokenised in chunks: the library needs many times the memory of its text."""
        tokens: Tokens = []
        start = 0
        while len(text) - start > LONGEST_TEXT and (cut := self._cut(text, start + LONGEST_TEXT // 2)) is not None:
            tokens += self._plain(text[start:cut])
            start = cut
        return tokens + self._plain(text[start:])

    def _cut(self, text: str, near: int) -> int | None:
        """A place after `near` between two words where the tokens on each side are those of the text as a whole.

        That is checked in the text around it: what decides on a token is near it. None if no such place is found.
        """
        for found in itertools.islice(_BETWEEN_WORDS.finditer(text, near), _TRIED_CUTS):
            cut = found.start() + 1
            left, right = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
            if self._plain(left + right) == [*self._plain(left), *self._plain(right)]:
                return cut
        return None

    def _whole(self, example: Example) -> tuple[Tokens, bytes]:
        ids, offsets = self.tokenizer.ids_and_offsets(example.text)
        borders = {border for span in example.spans for border in span}
        if any(start < border < stop for start, stop in offsets for border in borders):
            return self._guarded(example)
        return ids, _learned(example, offsets)

    def _guarded(self, example: Example) -> tuple[Tokens, bytes]:
        """Tokens of the pieces, each but the first after a line break: the tokenizer then adds no space."""
        guard = self._plain("\n")
        tokens: Tokens = []
        learned = b""
        for k, (text, bit) in enumerate(_pieces(example)):
            piece = self._plain("\n" + text if k else text)
            if k:
                piece = piece[len(guard) :] if piece[: len(guard)] == guard else self._plain(text)
            tokens += piece
            learned += _BITS[bit] * len(piece)
        return tokens, learned

    def _ended(self, example: Example, tokens: Tokens, learned: bytes) -> tuple[Tokens, bytes]:
        """With the tokens that the tokenizer adds at both ends, without duplicates, and a learned end-of-text token."""
        if example.complete:
            return tokens, learned
        before = self.before[: len(self.before) - _overlap(self.before, tokens)]
        after = self.after[_overlap(tokens, self.after) :]
        if before or after:
            tokens, learned = before + tokens + after, bytes(len(before)) + learned + _BITS[1] * len(after)
        if self.end is not None and self.end not in self.after and tokens[-1:] != [self.end]:
            tokens, learned = [*tokens, self.end], learned + _BITS[1]
        return tokens, learned

    def _sequences(self, tokens: Tokens, learned: bytes) -> Encoded:
        most = self.max_length
        if len(tokens) <= most and (tokens or not self.divide):
            return Encoded([(tokens, learned)], False)
        if not self.divide:
            return Encoded([(tokens[:most], learned[:most])], len(tokens) > most)
        starts = list(range(0, len(tokens), most))
        if len(starts) > 1 and len(tokens) - starts[-1] == 1 and most > 2:
            starts[-1] -= 1  # the first token of a sequence is never predicted: it must not be the end token
        stops = [*starts[1:], len(tokens)]
        return Encoded([(tokens[a:b], learned[a:b]) for a, b in zip(starts, stops, strict=True)], False)

    def _plain(self, text: str) -> Tokens:
        return self.tokenizer.ids([text])[0]

    def _added(self) -> tuple[Tokens, Tokens]:
        """The tokens that the tokenizer adds before and after a text."""
        plain, whole = self._plain("a"), self.tokenizer.ids_with_ends("a")
        for k in range(len(whole) - len(plain) + 1):
            if plain and whole[k : k + len(plain)] == plain:
                return whole[:k], whole[k + len(plain) :]
        return [], []


def _pieces(example: Example) -> Iterator[Piece]:
    """The example's text, split at the borders of learned spans, with 1 for learned pieces."""
    at = 0
    for start, stop in sorted(example.spans):
        if start > at:
            yield example.text[at:start], 0
        if stop > max(at, start):
            yield example.text[max(at, start) : stop], 1
        at = max(at, stop)
    if at < len(example.text):
        yield example.text[at:], 0


def _learned(example: Example, offsets: Sequence[tuple[int, int]]) -> bytes:
    """1 for each token that starts inside a learned span."""
    learned = bytearray(len(offsets))
    spans = iter(sorted(example.spans))
    span = next(spans, None)
    for i, (start, _) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(spans, None)
        if span is None:
            break
        learned[i] = int(start >= span[0])
    return bytes(learned)


def _overlap(first: Tokens, second: Tokens) -> int:
    """How many tokens at the end of `first` are also the start of `second`."""
    return next((k for k in range(min(len(first), len(second)), 0, -1) if first[-k:] == second[:k]), 0)

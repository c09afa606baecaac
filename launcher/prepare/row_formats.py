"""Converts a row of a data set to text and the spans of it that the model learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.job.schema import TEMPLATE_RESERVED
from launcher.prepare.chat_template import ChatTemplate, Rendered
from launcher.prepare.conversations import Conversation, Reason, conversation_of, tools_of
from launcher.prepare.row_values import BadRow, Row, from_json, list_of, text_of

__all__ = ["NEEDED", "USED", "BadRow", "Example", "Reader", "detect_format", "unused_columns"]

Span = tuple[int, int]

NEEDED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_CHAT = ("system", "tools", "chat_template_kwargs")
USED: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", *_CHAT),
    "prompt-completion": ("prompt", "completion", *_CHAT),
    "instruction": ("instruction", "output", "input", "history", *_CHAT),
    "text": ("text",),
}
"""The columns that each format reads, if present."""
_ROW_NUMBERS = {"id", "idx", "index", "uuid", "_id", "__index_level_0__"}


@dataclass(frozen=True)
class Example:
    """Text and the character spans of it that are learned.

    `complete`: the text already contains its special tokens (from a chat template); otherwise the tokenizer adds the
    beginning-of-text token, and an end-of-text token is appended and learned. `partly`: some assistant turns that
    should be learned were not found in the text. `shortened`, `open_ended` and `unwritten` as in `Rendered`.
    """

    text: str
    spans: tuple[Span, ...]
    complete: bool = False
    partly: bool = field(default=False, compare=False)
    shortened: bool = field(default=False, compare=False)
    open_ended: bool = field(default=False, compare=False)
    unwritten: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reader:
    """Reads rows of one format, with a chat template if there is one; `learn`: which assistant turns are learned.

    `padded`: the file format pads objects with null for the keys of other rows; these keys are removed.
    """

    kind: str
    template: ChatTemplate | None
    learn: Literal["all", "last"] = "all"
    padded: bool = True

    def read(self, row: Row) -> Example | Reason:
        """The example in `row`, or why it has nothing to learn. Raises BadRow."""
        if self.kind == "messages":
            return self._messages(row)
        if self.kind == "prompt-completion":
            return self._prompt(row)
        if self.kind == "instruction":
            return self._instruction(row)
        text = text_of(row, "text")
        return Example(text, ((0, len(text)),)) if text.strip() else Reason.EMPTY

    def _messages(self, row: Row) -> Example | Reason:
        name = "messages" if row.get("messages") is not None else "conversations"
        turns = list_of(row, name) if row.get(name) is not None else []
        return self._conversation(turns, row) if turns else Reason.EMPTY

    def _prompt(self, row: Row) -> Example | Reason:
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, list) and not isinstance(completion, list):
            before, after = text_of(row, "prompt"), text_of(row, "completion")
            reject_columns(row, _CHAT, "a text prompt")
            return Example(before + after, ((len(before), len(before + after)),)) if after.strip() else Reason.EMPTY
        first = _turns_of(prompt, "prompt", "user")
        answer = _turns_of(completion, "completion", "assistant")
        return self._conversation(first + answer, row, len(first)) if answer else Reason.EMPTY

    def _instruction(self, row: Row) -> Example | Reason:
        question, answer, extra = text_of(row, "instruction"), text_of(row, "output"), text_of(row, "input")
        if not answer.strip():
            return Reason.EMPTY
        if extra.strip():
            question = f"{question}\n\n{extra}" if question.strip() else extra
        turns = [*_history(row), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if self.template is not None:
            return self._conversation(turns, row)
        reject_columns(row, ("tools", "chat_template_kwargs"), "a tokenizer without a chat template")
        return _alpaca(turns, text_of(row, "system"), self.learn)

    def _conversation(self, turns: list[Any], row: Row, first: int = 0) -> Example | Reason:
        """`turns` in the chat template, with the assistant turns from `first` on as spans."""
        if self.template is None:
            raise BadRow("rows with messages need a chat template, but the tokenizer has none: set data.chat_template")
        system = text_of(row, "system")
        if system.strip():
            if any(isinstance(turn, Mapping) and turn.get("role", turn.get("from")) == "system" for turn in turns):
                raise BadRow("the row has a system column and a turn of role system: keep one of them")
            turns, first = [{"role": "system", "content": system}, *turns], first + (first > 0)
        conversation = conversation_of(turns, self.template.text, self.padded)
        conversation.tools = tools_of(row.get("tools"), self.padded)
        conversation.template_kwargs = _kwargs_of(row)
        return self._rendered(conversation, first)

    def _rendered(self, conversation: Conversation, first: int) -> Example | Reason:
        assert self.template is not None
        wanted = conversation.to_learn(first, self.learn == "last")
        if isinstance(wanted, Reason):
            return wanted
        rendered: Rendered = self.template.render(conversation, wanted)
        spans = _joined(span for i in wanted for span in rendered.turns.get(i, ()))
        if not spans:
            return Reason.NOT_FOUND
        return Example(
            rendered.text,
            spans,
            complete=True,
            partly=rendered.divided or any(i not in rendered.turns for i in wanted),
            shortened=rendered.shortened,
            open_ended=rendered.open_ended,
            unwritten=rendered.unwritten,
        )


def detect_format(columns: Iterable[str]) -> str:
    """The format whose columns are all present. Raises BadRow with the columns found and those needed."""
    names = set(columns)
    if "conversations" in names:
        return "messages"
    for name, needed in NEEDED.items():
        if names.issuperset(needed):
            return name
    wanted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in NEEDED.items())
    raise BadRow(f"columns {', '.join(sorted(names)) or '(none)'} do not match any format; needed: {wanted}")


def unused_columns(columns: Iterable[str], kind: str) -> list[str]:
    """The unused columns of rows of format `kind`, except row numbers and ids."""
    return sorted(set(columns) - set(USED[kind]) - _ROW_NUMBERS)


def reject_columns(row: Row, names: Iterable[str], where: str) -> None:
    """Raises BadRow if one of these columns has a value: it is meaningful but not supported here."""
    for name in names:
        if row.get(name):
            raise BadRow(f"the column {name} cannot be used with {where}")


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans in order; adjacent and overlapping ones are merged."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _turns_of(value: Any, name: str, role: str) -> list[Any]:
    """The messages of a prompt or completion, which may also be text. Raises BadRow."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    if not isinstance(value, list):
        raise BadRow(f"{name} must be text or a list of messages")
    if not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("prompt and completion are lists: each must be one text or a list of messages")
    return list(value)


def _history(row: Row) -> list[dict[str, Any]]:
    """The earlier questions and answers of an instruction row."""
    if not row.get("history"):
        return []
    turns = []
    for pair in list_of(row, "history"):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"history must be a list of question-answer pairs, found {str(pair)[:60]!r}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _alpaca(turns: list[dict[str, Any]], system: str, learn: str) -> Example:
    """Questions and answers for a tokenizer without a chat template."""
    text, spans = f"{system}\n\n" if system.strip() else "", []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text += f"### Instruction:\n{question['content']}\n\n### Response:\n"
        start = len(text)
        text += answer["content"]
        spans.append((start, len(text)))
        text += "\n\n" if answer is not turns[-1] else ""
    return Example(text, tuple(spans if learn == "all" else spans[-1:]))


def _kwargs_of(row: Row) -> dict[str, Any]:
    """The row's variables for the chat template. Raises BadRow."""
    if not row.get("chat_template_kwargs"):
        return {}
    given = from_json(row["chat_template_kwargs"], "chat_template_kwargs")
    if not isinstance(given, Mapping):
        raise BadRow("chat_template_kwargs must be an object")
    if taken := sorted(TEMPLATE_RESERVED & set(given)):
        raise BadRow(f"chat_template_kwargs may not set {', '.join(taken)}")
    return {key: value for key, value in given.items() if value is not None}

"""From a row of a data set to text and the spans of it that the model should learn."""

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
"""The columns that each format reads, if they are there."""
_ROW_NUMBERS = {"id", "idx", "index", "uuid", "_id", "__index_level_0__"}


@dataclass(frozen=True)
class Example:
    """Text, the character spans of it that are learned, and how it is tokenised.

    `complete`: the text carries its own special tokens (a chat template wrote it); otherwise the tokenizer adds the
    beginning-of-text token and an end-of-text token is appended and learned. `partly`: the row wants assistant turns
    learned that were not found in the text. `shortened`, `open_ended` and `unwritten` as in `Rendered`.
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
    """How rows are read: their format, the chat template if there is one, and which assistant turns are learned.

    `padded`: the file's kind pads objects with the keys of other rows as nulls, which are removed.
    """

    kind: str
    template: ChatTemplate | None
    learn: Literal["all", "last"] = "all"
    padded: bool = True

    def read(self, row: Row) -> Example | Reason:
        """What is learned of `row`, or why nothing is. Raises BadRow."""
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
            refuse_unused(row, _CHAT, "a prompt that is text")
            return Example(before + after, ((len(before), len(before + after)),)) if after.strip() else Reason.EMPTY
        first = _turns_of(prompt, "prompt", "user")
        answer = _turns_of(completion, "completion", "assistant")
        return self._conversation(first + answer, row, len(first)) if answer else Reason.EMPTY

    def _instruction(self, row: Row) -> Example | Reason:
        asked, answer, extra = text_of(row, "instruction"), text_of(row, "output"), text_of(row, "input")
        if not answer.strip():
            return Reason.EMPTY
        if extra.strip():
            asked = f"{asked}\n\n{extra}" if asked.strip() else extra
        turns = [*_history(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if self.template is not None:
            return self._conversation(turns, row)
        refuse_unused(row, ("tools", "chat_template_kwargs"), "a tokenizer without a chat template")
        return _alpaca(turns, text_of(row, "system"), self.learn)

    def _conversation(self, turns: list[Any], row: Row, first: int = 0) -> Example | Reason:
        """`turns` in the model's own template, with the assistant turns from `first` on as spans."""
        if self.template is None:
            raise BadRow("the tokenizer has no chat template, which rows of messages need: set data.chat_template")
        system = text_of(row, "system")
        if system.strip():
            if any(isinstance(turn, Mapping) and turn.get("role", turn.get("from")) == "system" for turn in turns):
                raise BadRow("there is a system column and a turn of role system: keep one of them")
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
    """The format whose columns are all there. Raises BadRow with the columns found and those that would do."""
    names = set(columns)
    if "conversations" in names:
        return "messages"
    for name, needed in NEEDED.items():
        if names.issuperset(needed):
            return name
    wanted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in NEEDED.items())
    raise BadRow(f"columns {', '.join(sorted(names)) or '(none)'} fit no format. Needed are {wanted}")


def unused_columns(columns: Iterable[str], kind: str) -> list[str]:
    """The columns that rows of format `kind` have and nobody reads, without those that only number the rows."""
    return sorted(set(columns) - set(USED[kind]) - _ROW_NUMBERS)


def refuse_unused(row: Row, names: Iterable[str], where: str) -> None:
    """Raises BadRow if one of the columns holds something: its meaning is known, and it cannot be used."""
    for name in names:
        if row.get(name):
            raise BadRow(f"the column {name} cannot be used with {where}")


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans in order, those that touch each other as one."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _turns_of(value: Any, name: str, role: str) -> list[Any]:
    """The messages of a prompt or completion, of which one may be plain text beside a list. Raises BadRow."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    if not isinstance(value, list):
        raise BadRow(f"{name} must be text or a list of messages")
    if not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("prompt and completion are lists: each must be one text, or a list of messages")
    return list(value)


def _history(row: Row) -> list[dict[str, Any]]:
    """The earlier questions and answers of a row of instructions."""
    if not row.get("history"):
        return []
    turns = []
    for pair in list_of(row, "history"):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"history must be a list of pairs of question and answer, found {str(pair)[:60]!r}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _alpaca(turns: list[dict[str, Any]], system: str, learn: str) -> Example:
    """Questions and answers for a tokenizer without a chat template."""
    text, spans = f"{system}\n\n" if system.strip() else "", []
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        text += f"### Instruction:\n{asked['content']}\n\n### Response:\n"
        begin = len(text)
        text += answered["content"]
        spans.append((begin, len(text)))
        text += "\n\n" if answered is not turns[-1] else ""
    return Example(text, tuple(spans if learn == "all" else spans[-1:]))


def _kwargs_of(row: Row) -> dict[str, Any]:
    """The row's own variables for the chat template. Raises BadRow."""
    if not row.get("chat_template_kwargs"):
        return {}
    given = from_json(row["chat_template_kwargs"], "chat_template_kwargs")
    if not isinstance(given, Mapping):
        raise BadRow("chat_template_kwargs must be an object")
    if taken := sorted(TEMPLATE_RESERVED & set(given)):
        raise BadRow(f"chat_template_kwargs may not set {', '.join(taken)}")
    return {key: value for key, value in given.items() if value is not None}

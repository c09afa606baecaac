"""From a row of a data set to text and the spans of it that the model should learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Render = Callable[..., str]
Span = tuple[int, int]

NEEDED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class BadRow(ValueError):
    """A row that does not hold what its format needs."""


@dataclass(frozen=True)
class Example:
    """Text, the character spans of it that are learned, and how it is tokenised.

    `complete`: the text carries its own special tokens (a chat template wrote it); otherwise the tokenizer adds the
    beginning-of-text token and an end-of-text token is appended and learned. `partly` tells that the chat template
    did not let every assistant turn be found.
    """

    text: str
    spans: tuple[Span, ...]
    complete: bool = False
    partly: bool = field(default=False, compare=False)


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


def to_example(row: Row, kind: str, render: Render | None) -> Example | None:
    """What `row` says in the format `kind`; None where it holds nothing.

    `render(messages, add_generation_prompt=False, tools=None)` applies the tokenizer's chat template; None where it
    has none. Raises BadRow.
    """
    if kind == "messages":
        return _from_messages(row, render)
    if kind == "prompt-completion":
        return _from_prompt(row, render)
    if kind == "instruction":
        return _from_instruction(row, render)
    text = _text_of(row, "text")
    return Example(text, ((0, len(text)),)) if text.strip() else None


def _from_messages(row: Row, render: Render | None) -> Example | None:
    messages = row.get("messages")
    if messages is None and row.get("conversations") is not None:
        messages = [_from_sharegpt(turn) for turn in _list_of(row, "conversations")]
    elif messages is not None:
        messages = [_message(turn) for turn in _list_of(row, "messages")]
    if not messages:
        return None
    return render_conversation(messages, range(len(messages)), render, row.get("tools"))


def _from_prompt(row: Row, render: Render | None) -> Example | None:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        first = [_message(turn) for turn in prompt]
        turns = first + [_message(turn) for turn in completion]
        return render_conversation(turns, range(len(first), len(turns)), render, row.get("tools"))
    before, after = _text_of(row, "prompt"), _text_of(row, "completion")
    return Example(before + after, ((len(before), len(before + after)),)) if after else None


def _from_instruction(row: Row, render: Render | None) -> Example | None:
    asked, answer = _text_of(row, "instruction"), _text_of(row, "output")
    extra = row.get("input")
    if not answer:
        return None
    if isinstance(extra, str) and extra.strip():
        asked = f"{asked}\n\n{extra}"
    if render is not None:
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return render_conversation(messages, (1,), render, None)
    before = f"### Instruction:\n{asked}\n\n### Response:\n"
    return Example(before + answer, ((len(before), len(before + answer)),))


def render_conversation(
    messages: list[dict[str, Any]], learned: Iterable[int], render: Render | None, tools: Any
) -> Example | None:
    """The conversation in the model's own template, with the assistant turns among `learned` as spans.

    A span runs from the end of the generation prompt to the end of the turn, its end-of-turn token included. A
    template that rewrites earlier turns once later ones follow (thinking models do) lets only the last be found.
    """
    if render is None:
        raise BadRow("the tokenizer has no chat template, which rows of messages need")
    wanted = [i for i in learned if messages[i]["role"] == "assistant"]
    whole = render(messages, tools=tools)
    spans: list[Span] = []
    for i in wanted:
        before = render(messages[:i], add_generation_prompt=True, tools=tools) if i else _opening(whole, render, tools)
        through = render(messages[: i + 1], tools=tools)
        if before is not None and whole.startswith(through) and through.startswith(before):
            spans.append((len(before), len(through)))
    if not spans:
        return None
    return Example(whole, tuple(spans), complete=True, partly=len(spans) < len(wanted))


def _opening(whole: str, render: Render, tools: Any) -> str | None:
    """What stands before the answer in a conversation that an assistant turn begins; None where that is not found.

    Templates render no empty conversation, so the generation prompt is taken from one with a question.
    """
    question = [{"role": "user", "content": "?"}]
    asked, prompted = render(question, tools=tools), render(question, add_generation_prompt=True, tools=tools)
    prompt = prompted.removeprefix(asked)
    head, found, _ = whole.partition(prompt)
    return head + found if found and prompt != prompted else None


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
        raise BadRow(f"a message needs role and content, found {str(turn)[:80]!r}")
    return {key: value for key, value in turn.items() if value is not None or key == "content"}


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    role = turn.get("from") if isinstance(turn, Mapping) else None
    if role is None:
        return _message(turn)
    if role not in _SHAREGPT_ROLES or not isinstance(turn.get("value"), str):
        raise BadRow(f"a turn needs from ({', '.join(_SHAREGPT_ROLES)}) and value, found {str(turn)[:80]!r}")
    return {"role": _SHAREGPT_ROLES[role], "content": turn["value"]}


def _list_of(row: Row, name: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list):
        raise BadRow(f"{name} must be a list, found {type(value).__name__}")
    return value


def _text_of(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, found {type(value).__name__}")
    return value

"""A model's chat template: rendering conversations with it and finding in them what the assistant writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jinja2

from launcher.errors import Problem, RequestError
from launcher.job.user_path import user_path
from launcher.prepare.conversations import Conversation, Message, Messages
from launcher.prepare.marks import Mark, Marked
from launcher.prepare.row_values import BadRow
from launcher.prepare.template_environment import (
    DATE,
    compile_template,
    generation_spans,
    has_generation_blocks,
    render_template,
)
from launcher.prepare.turn_spans import Spanned, TurnFinder

Span = tuple[int, int]
TEMPLATE_KEY = "data.chat_template"


@dataclass(frozen=True)
class Form:
    """How messages are handed to a template: templates differ in what they can read.

    `parts`: content as a list of text parts. `json_arguments`: arguments of tool calls as JSON text. `no_content`: what
    a tool call without text has as its content.
    """

    parts: bool = False
    json_arguments: bool = False
    no_content: Literal["missing", "null", "empty"] = "missing"

    def apply(self, message: Message) -> Message:
        """The message in this form."""
        changed = dict(message)
        if self.parts and isinstance(message.get("content"), str):
            changed["content"] = [{"type": "text", "text": message["content"]}]
        if "content" not in message and self.no_content != "missing":
            changed["content"] = None if self.no_content == "null" else ""
        if self.json_arguments and "tool_calls" in message:
            changed["tool_calls"] = [_with_json_arguments(call) for call in message["tool_calls"]]
        return changed


FORMS = tuple(
    Form(parts, json_arguments, no_content)
    for parts in (False, True)
    for json_arguments in (False, True)
    for no_content in ("missing", "null", "empty")
)


class LeftOut(BadRow):
    """A row of which the template leaves out what it must not. `depth`: how much else was found to be there."""

    def __init__(self, message: str, depth: int) -> None:
        super().__init__(message)
        self.depth = depth


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it.

    `turns` has the spans of each assistant turn that was found. `shortened`: the template leaves out part of what an
    assistant turn says, such as its reasoning. `open_ended`: nothing that can be learned ends the last turn.
    `unwritten`: what of the generation prompt the template does not write in front of the last turn. `divided`: it
    writes another message in the middle of a turn, of which only the part before that is in `turns`.
    """

    text: str
    turns: dict[int, list[Span]]
    shortened: bool
    open_ended: bool
    unwritten: str = ""
    divided: bool = False


class ChatTemplate:
    """The template `source`, called `name` in messages.

    `special_tokens` are the variables that templates have besides (bos_token, …), `tokens` the texts that the tokenizer
    never divides.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        name: str,
        special_tokens: Mapping[str, Any] | None = None,
        tokens: Iterable[str] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.name, self.tokens = name, tuple(tokens)
        self.variables = {**(special_tokens or {}), **(template_kwargs or {})}
        self._finders: dict[tuple[str, Form, str], TurnFinder] = {}
        self._form = Form()
        for text in self.sources.values():
            _check_syntax(text, name)

    @property
    def text(self) -> str:
        """All the template's source, for looking up names in it."""
        return "\n".join(self.sources.values())

    @property
    def writes_date(self) -> bool:
        """Whether the text has today's date in it, which is DATE here."""
        return "strftime_now" in self.text and "date_string" not in self.variables

    def render(self, conversation: Conversation, wanted: Iterable[int]) -> Rendered:
        """The conversation and the spans of the assistant turns `wanted`. Raises BadRow."""
        wanted = list(wanted)
        errors: list[tuple[tuple[int, bool, bool], BadRow]] = []
        for form in self._forms(conversation):
            try:
                spanned = self._finder(form, conversation).find(conversation.messages, conversation.tools, wanted)
                self._check(conversation, spanned.marked, form)
            except BadRow as error:
                depth = error.depth if isinstance(error, LeftOut) else -1
                errors.append(((depth, not form.parts, form.no_content == "empty"), error))
                continue
            self._form = form
            return _rendered(spanned, wanted)
        raise max(errors, key=lambda found: found[0])[1]  # of the form that goes furthest

    def _forms(self, conversation: Conversation) -> Iterator[Form]:
        """The forms to try, of those that make a difference: what worked last, then the others."""
        calls = [message for message in conversation.messages if "tool_calls" in message]
        bare = any("content" not in message for message in calls)
        can = [form for form in FORMS if (calls or not form.json_arguments) and (bare or form.no_content == "missing")]
        yield from sorted(can, key=lambda form: form != self._form)

    def _finder(self, form: Form, conversation: Conversation) -> TurnFinder:
        source = self._source(conversation.tools)
        own = conversation.template_kwargs
        key = (source, form, json.dumps(own, sort_keys=True, default=str))
        if key not in self._finders:
            variables = {**self.variables, **own}
            blocks = partial(self._generation, source, form, variables) if has_generation_blocks(source) else None
            self._finders[key] = TurnFinder(partial(self._render, source, form, variables), self.tokens, blocks)
        return self._finders[key]

    def _source(self, tools: Any) -> str:
        """The template that transformers would take among those of a model with several."""
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            raise BadRow(f"{self.name} has the templates {', '.join(self.sources)} and none called default")
        return self.sources["default"]

    def _render(
        self,
        source: str,
        form: Form,
        variables: Mapping[str, Any],
        messages: Messages,
        add_generation_prompt: bool = False,
        tools: Any = None,
    ) -> str:
        given = {"documents": None, **variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return render_template(source, [form.apply(message) for message in messages], given)
        except Exception as error:  # a template is a program: it raises anything
            raise BadRow(f"{self.name} refuses these messages: {error}") from None

    def _generation(
        self, source: str, form: Form, variables: Mapping[str, Any], messages: Messages, tools: Any
    ) -> list[Span]:
        given = {"documents": None, **variables, "tools": tools, "add_generation_prompt": False}
        return generation_spans(source, [form.apply(message) for message in messages], given)

    def _check(self, conversation: Conversation, marked: Marked, form: Form) -> None:
        """Is all of the conversation in the text? Raises BadRow with what is not."""
        gone = marked.left_out
        if form.parts and "{'type': 'text'" in marked.text:
            raise BadRow(f"{self.name} writes the parts of a content as Python prints them")
        for i, message in enumerate(conversation.messages):
            if any(mark.what == "call" and mark.message == i for mark in gone):
                raise LeftOut(f"{self.name} writes no tool_calls (message {i + 1})", 2 * i + 1)
            if Mark(i, "end") in gone and Mark(i, "start") in gone and "tool_calls" not in message:
                raise LeftOut(f"{self.name} leaves out the turn of role {message['role']} (message {i + 1})", 2 * i)
            for call in message.get("tool_calls", ()) if not form.json_arguments else ():
                arguments = call["function"]["arguments"]
                if arguments and str(arguments) in marked.text and _json(arguments) not in marked.text:
                    raise BadRow(f"{self.name} writes the arguments of tool calls as Python prints them, not as JSON")
        if any(mark.what == "tool" for mark in gone):
            raise LeftOut(
                f"{self.name} writes no tools, so a model could not know what it may call",
                2 * len(conversation.messages),
            )


def read_template(value: str) -> tuple[str, str]:
    """(source, name) of `data.chat_template`: a file, or the template itself. Raises RequestError."""
    if "{{" in value or "{%" in value:
        return value, "the chat template of the job"
    path = user_path(value, "data.chat_template")
    try:
        return path.read_text(encoding="utf-8"), f"the chat template {path}"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        hint = "a file with a Jinja template, or the template itself"
        raise RequestError(Problem(f"{value} cannot be read: {reason}", key=TEMPLATE_KEY, hint=hint)) from None


def date_note() -> str:
    """What a user should know about a template that writes the date."""
    return (
        f"the chat template writes today's date: the data is tokenised with {DATE:%d %b %Y}, so that it is the same "
        f"each day; templates that read date_string take another from data.chat_template_kwargs"
    )


def _check_syntax(source: str, name: str) -> None:
    try:
        compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        message = f"{name} is not a Jinja template (line {error.lineno}): {error.message}"
        raise RequestError(Problem(message, key=TEMPLATE_KEY)) from None


def _rendered(spanned: Spanned, wanted: list[int]) -> Rendered:
    learned = set(wanted)
    shortened = any(m.message in learned for m in spanned.marked.left_out)
    last = spanned.turns[max(spanned.turns)] if spanned.turns else None
    return Rendered(
        text=spanned.marked.text,
        turns={i: turn.spans for i, turn in spanned.turns.items()},
        shortened=shortened,
        open_ended=last is not None and not last.closed,
        unwritten=last.unwritten if last is not None else "",
        divided=any(turn.divided for turn in spanned.turns.values()),
    )


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

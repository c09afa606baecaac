"""A model's chat template: renders conversations and finds the assistant's text in them."""

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
from launcher.prepare.row_values import BadRow
from launcher.prepare.template_environment import (
    DATE,
    compile_template,
    generation_spans,
    has_generation_blocks,
    render_template,
)
from launcher.prepare.template_markers import MarkedText, Marker
from launcher.prepare.turn_spans import Spanned, TurnFinder

Span = tuple[int, int]
TEMPLATE_KEY = "data.chat_template"


@dataclass(frozen=True)
class Form:
    """How messages are passed to a template: templates differ in what they accept.

    `parts`: content as a list of text parts. `json_arguments`: arguments of tool calls as JSON text. `no_content`: the
    content of a tool call without text.
    """

    parts: bool = False
    json_arguments: bool = False
    no_content: Literal["missing", "null", "empty"] = "missing"

    def apply(self, message: Message) -> Message:
        """The message in this form."""
        if self == _PLAIN:
            return message
        changed = dict(message)
        if self.parts and isinstance(message.get("content"), str):
            changed["content"] = [{"type": "text", "text": message["content"]}]
        if "content" not in message and self.no_content != "missing":
            changed["content"] = None if self.no_content == "null" else ""
        if self.json_arguments and "tool_calls" in message:
            changed["tool_calls"] = [_with_json_arguments(call) for call in message["tool_calls"]]
        return changed


_PLAIN = Form()
FORMS = tuple(
    Form(parts, json_arguments, no_content)
    for parts in (False, True)
    for json_arguments in (False, True)
    for no_content in ("missing", "null", "empty")
)


class IncompleteRendering(BadRow):
    """The template drops required parts of a row. `depth`: how many parts were found before."""

    def __init__(self, message: str, depth: int) -> None:
        super().__init__(message)
        self.depth = depth


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered by the template.

    `turns`: the spans of each assistant turn that was found. `shortened`: the template drops part of an assistant turn,
    such as its reasoning. `open_ended`: no text that can be learned ends the last turn. `unwritten`: the part of the
    generation prompt that the template does not write before the last turn. `divided`: the template writes another
    message inside a turn; `turns` only has the part before it.
    """

    text: str
    turns: dict[int, list[Span]]
    shortened: bool
    open_ended: bool
    unwritten: str = ""
    divided: bool = False


class ChatTemplate:
    """The template `source`; messages call it `name`.

    `special_tokens`: extra variables for the template (bos_token, …). `tokens`: texts that the tokenizer never splits.
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
        """The source of all templates, to search for names."""
        return "\n".join(self.sources.values())

    @property
    def writes_date(self) -> bool:
        """Whether the template writes today's date; here that is DATE."""
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
                depth = error.depth if isinstance(error, IncompleteRendering) else -1
                errors.append(((depth, not form.parts, form.no_content == "empty"), error))
                continue
            self._form = form
            return _rendered(spanned, wanted)
        raise max(errors, key=lambda found: found[0])[1]  # from the form that got furthest

    def _forms(self, conversation: Conversation) -> Iterator[Form]:
        """The relevant forms to try: the last successful one first."""
        calls = [message for message in conversation.messages if "tool_calls" in message]
        bare = any("content" not in message for message in calls)
        can = [form for form in FORMS if (calls or not form.json_arguments) and (bare or form.no_content == "missing")]
        yield from sorted(can, key=lambda form: form != self._form) if len(can) > 1 else can

    def _finder(self, form: Form, conversation: Conversation) -> TurnFinder:
        source = self._source(conversation.tools)
        own = conversation.template_kwargs
        key = (source, form, json.dumps(own, sort_keys=True, default=str) if own else "{}")
        if key not in self._finders:
            variables = {**self.variables, **own}
            blocks = partial(self._generation, source, form, variables) if has_generation_blocks(source) else None
            self._finders[key] = TurnFinder(partial(self._render, source, form, variables), self.tokens, blocks)
        return self._finders[key]

    def _source(self, tools: Any) -> str:
        """The template that transformers would choose from those of the model."""
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            raise BadRow(f"{self.name} has the templates {', '.join(self.sources)}, but none called default")
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
        except Exception as error:  # a template is a program: it can raise anything
            raise BadRow(f"{self.name} rejects these messages: {error}") from None

    def _generation(
        self, source: str, form: Form, variables: Mapping[str, Any], messages: Messages, tools: Any
    ) -> list[Span]:
        given = {"documents": None, **variables, "tools": tools, "add_generation_prompt": False}
        return generation_spans(source, [form.apply(message) for message in messages], given)

    def _check(self, conversation: Conversation, marked: MarkedText, form: Form) -> None:
        """Raises BadRow if a part of the conversation is missing in the text."""
        dropped = marked.dropped
        if form.parts and "{'type': 'text'" in marked.text:
            raise BadRow(f"{self.name} writes content parts in Python's notation")
        if not dropped and not any("tool_calls" in message for message in conversation.messages):
            return
        for i, message in enumerate(conversation.messages):
            if any(marker.kind == "call" and marker.message == i for marker in dropped):
                raise IncompleteRendering(f"{self.name} does not write tool_calls (message {i + 1})", 2 * i + 1)
            if Marker(i, "end") in dropped and Marker(i, "start") in dropped and "tool_calls" not in message:
                raise IncompleteRendering(
                    f"{self.name} drops the turn of role {message['role']} (message {i + 1})", 2 * i
                )
            for call in message.get("tool_calls", ()) if not form.json_arguments else ():
                arguments = call["function"]["arguments"]
                if arguments and str(arguments) in marked.text and _json(arguments) not in marked.text:
                    raise BadRow(f"{self.name} writes the arguments of tool calls in Python's notation, not as JSON")
        if any(marker.kind == "tool" for marker in dropped):
            raise IncompleteRendering(
                f"{self.name} does not write tools, so a model cannot know what it may call",
                2 * len(conversation.messages),
            )


def read_template(value: str) -> tuple[str, str]:
    """(source, name) of `data.chat_template`, which is a file or the template itself. Raises RequestError."""
    if "{{" in value or "{%" in value:
        return value, "the chat template of the job"
    path = user_path(value, "data.chat_template")
    try:
        return path.read_text(encoding="utf-8"), f"the chat template {path}"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        hint = "name a file with a Jinja template, or write the template itself"
        raise RequestError(Problem(f"{value} cannot be read: {reason}", key=TEMPLATE_KEY, hint=hint)) from None


def date_note() -> str:
    """The note for a template that writes the date."""
    return (
        f"the chat template writes today's date: the data is tokenised with {DATE:%d %b %Y}, to be the same every day; "
        f"to change it in templates that read date_string, set that in data.chat_template_kwargs"
    )


def _check_syntax(source: str, name: str) -> None:
    try:
        compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        message = f"{name} is not a Jinja template (line {error.lineno}): {error.message}"
        raise RequestError(Problem(message, key=TEMPLATE_KEY)) from None


def _rendered(spanned: Spanned, wanted: list[int]) -> Rendered:
    learned = set(wanted)
    shortened = any(m.message in learned for m in spanned.marked.dropped)
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

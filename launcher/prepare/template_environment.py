"""Compiles chat templates like transformers, with a fixed date and the positions of generation blocks.

transformers reads the clock for `strftime_now`, so the same data set would be tokenised differently every day. Here it
is always DATE, which is the default in Llama's templates without a clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

DATE = datetime(2024, 7, 26)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OPEN, _CLOSE = "\U0010fffc", "\U0010fffd"


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: renders the body, between two markers while `marking` is on."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's name and form)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.marking = False
        environment.extend(generation_blocks=self)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        body: str = caller()
        return f"{_OPEN}{body}{_CLOSE}" if self.marking else body

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Marks bodies inside the `with` block."""
        self.marking = True
        try:
            yield
        finally:
            self.marking = False


def has_generation_blocks(source: str) -> bool:
    """Whether a template has `{% generation %}` blocks."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template. Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = DATE.strftime
    environment.globals["namespace"] = _Namespace
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # it is read for each conversation, which takes long in Jinja's ChainMap
    return template


def render_template(source: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    """The rendered text. Raises what the template raises."""
    return compile_template(source).render(messages=_with_reasoning(messages), **variables)


def generation_spans(
    source: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """The spans of the template's generation blocks in what `render_template` returns."""
    template = compile_template(source)
    blocks: GenerationBlocks = template.environment.generation_blocks  # type: ignore[attr-defined]
    with blocks.marked():
        text = template.render(messages=_with_reasoning(messages), **variables)
    spans, opened = [], 0
    for removed, marker in enumerate(re.finditer(f"[{_OPEN}{_CLOSE}]", text)):
        position = marker.start() - removed
        if marker.group() == _OPEN:
            opened = position
        elif position > opened:
            spans.append((opened, position))
    return spans


def _with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with reasoning under all names that templates read, as in transformers."""
    prepared = []
    for message in messages:
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        prepared.append(message)
    return prepared


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of Jinja's filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace that rejects names with a leading underscore: templates are untrusted code."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name}")
        super().__setitem__(name, value)

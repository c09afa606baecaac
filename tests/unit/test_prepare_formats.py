"""From rows to text and to exactly the spans of it that are learned, with chat templates as plain functions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.prepare.formats import BadRow, Example, detect_format, to_example

Messages = list[dict[str, Any]]


def plain(messages: Messages, add_generation_prompt: bool = False, tools: Any = None) -> str:
    """A template such as ChatML's; tools stand at the top."""
    head = f"<tools>{tools}</tools>" if tools else ""
    text = "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)
    return head + text + ("<assistant>" if add_generation_prompt else "")


def with_default_system(messages: Messages, add_generation_prompt: bool = False, tools: Any = None) -> str:
    """A template that writes a system prompt where there is none."""
    own = [] if messages[0]["role"] == "system" else [{"role": "system", "content": "Be kind."}]
    return plain(own + messages, add_generation_prompt, tools)


def thinking(messages: Messages, add_generation_prompt: bool = False, tools: Any = None) -> str:
    """A template that leaves the thoughts of earlier answers out."""
    kept = [
        {**m, "content": m["content"].rpartition("</think>")[2]} if i < len(messages) - 1 else m
        for i, m in enumerate(messages)
    ]
    return plain(kept, add_generation_prompt, tools)


def chat(*turns: str) -> Messages:
    """Turns of user and assistant in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def learned(example: Example | None) -> list[str]:
    assert example is not None
    return [example.text[start:stop] for start, stop in example.spans]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages"], "messages"),
        (["conversations", "id"], "messages"),
        (["prompt", "completion"], "prompt-completion"),
        (["instruction", "input", "output"], "instruction"),
        (["instruction", "output", "text"], "instruction"),
        (["text"], "text"),
        (["messages", "text"], "messages"),
    ],
)
def test_formats_are_told_from_the_columns(columns: list[str], kind: str) -> None:
    assert detect_format(columns) == kind


@pytest.mark.parametrize("columns", [[], ["prompt"], ["Text"], ["question", "answer"]])
def test_columns_of_no_format_are_told_with_those_that_would_do(columns: list[str]) -> None:
    with pytest.raises(BadRow, match="prompt-completion: prompt, completion") as caught:
        detect_format(columns)
    assert all(column in str(caught.value) for column in columns)


def test_assistant_turns_are_learned_with_their_ends() -> None:
    example = to_example({"messages": chat("q1", "a1", "q2", "a2")}, "messages", plain)
    assert example is not None
    assert example.text == "<user>q1<end><assistant>a1<end><user>q2<end><assistant>a2<end>"
    assert learned(example) == ["a1<end>", "a2<end>"]
    assert (example.complete, example.partly) == (True, False)


CONTENT = st.text("ab <>\n", max_size=6)


@given(
    turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENT), min_size=1, max_size=6)
)
def test_every_assistant_turn_and_nothing_else_is_learned(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = [content + "<end>" for role, content in turns if role == "assistant"]
    example = to_example({"messages": messages}, "messages", plain)
    if not wanted:
        assert example is None
        return
    assert example is not None
    assert learned(example) == wanted
    for (start, _), text in zip(example.spans, wanted, strict=True):
        assert example.text[:start].endswith("<assistant>")
        assert example.text.startswith(text, start)


@pytest.mark.parametrize("render", [plain, with_default_system])
def test_a_conversation_may_begin_with_the_assistant(render: Any) -> None:
    messages = chat("ignored", "hello", "q", "a")[1:]
    assert learned(to_example({"messages": messages}, "messages", render)) == ["hello<end>", "a<end>"]


def test_a_template_that_rewrites_earlier_answers_lets_the_last_be_learned() -> None:
    messages = chat("q1", "<think>hm</think>a1", "q2", "<think>ah</think>a2")
    example = to_example({"messages": messages}, "messages", thinking)
    assert example is not None
    assert example.text == "<user>q1<end><assistant>a1<end><user>q2<end><assistant><think>ah</think>a2<end>"
    assert learned(example) == ["<think>ah</think>a2<end>"]
    assert example.partly


def test_tools_reach_the_template() -> None:
    example = to_example({"messages": chat("q", "a"), "tools": ["t1"]}, "messages", plain)
    assert example is not None
    assert example.text.startswith("<tools>['t1']</tools><user>")
    assert learned(example) == ["a<end>"]


def test_keys_that_are_empty_do_not_reach_the_template() -> None:
    seen: list[Messages] = []

    def render(messages: Messages, add_generation_prompt: bool = False, tools: Any = None) -> str:
        seen.append(messages)
        return plain(messages, add_generation_prompt, tools)

    turns = [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": None}]
    to_example({"messages": turns}, "messages", render)
    assert seen[0] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]


def test_sharegpt() -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q2"), ("assistant", "a2")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    example = to_example(row, "messages", plain)
    assert example is not None
    assert example.text == "<system>s<end><user>q<end><assistant>a<end><user>q2<end><assistant>a2<end>"
    assert learned(example) == ["a<end>", "a2<end>"]


def test_conversations_may_hold_messages() -> None:
    assert learned(to_example({"conversations": chat("q", "a")}, "messages", plain)) == ["a<end>"]


def test_prompt_and_completion_as_text() -> None:
    example = to_example({"prompt": "2+2=", "completion": "4"}, "prompt-completion", plain)
    assert example == Example("2+2=4", ((4, 5),))
    assert to_example({"prompt": None, "completion": "4"}, "prompt-completion", None) == Example("4", ((0, 1),))


def test_prompt_and_completion_as_messages_learn_only_the_completion() -> None:
    row = {"prompt": chat("q1", "a1", "q2"), "completion": [{"role": "assistant", "content": "a2"}]}
    assert learned(to_example(row, "prompt-completion", plain)) == ["a2<end>"]


def test_instructions_without_and_with_a_template() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    bare = to_example(row, "instruction", None)
    assert bare is not None
    assert bare.text == "### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3"
    assert (learned(bare), bare.complete) == (["3"], False)
    rendered = to_example(row, "instruction", plain)
    assert rendered is not None
    assert rendered.text == "<user>Add.\n\n1 2<end><assistant>3<end>"
    assert learned(rendered) == ["3<end>"]
    for empty in (None, "", "  "):
        shorter = to_example({**row, "input": empty}, "instruction", None)
        assert shorter is not None
        assert "Add.\n\n###" in shorter.text


def test_text_is_learned_whole() -> None:
    assert to_example({"text": "abc"}, "text", plain) == Example("abc", ((0, 3),))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({}, "messages"),
        ({"messages": chat("only a question")}, "messages"),
        ({"prompt": "p", "completion": ""}, "prompt-completion"),
        ({"prompt": "p", "completion": None}, "prompt-completion"),
        ({"instruction": "i", "output": ""}, "instruction"),
        ({"text": " \n"}, "text"),
        ({"text": None}, "text"),
    ],
)
def test_rows_that_hold_nothing_to_learn(row: dict[str, Any], kind: str) -> None:
    assert to_example(row, kind, plain) is None


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ({"messages": "hello"}, "messages", "messages must be a list, found str"),
        ({"messages": ["hello"]}, "messages", "a message needs role and content, found \"'hello'\"|'hello'"),
        ({"messages": [{"role": "user"}]}, "messages", "a message needs role and content"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages", "a message needs role and content"),
        ({"conversations": {"from": "human"}}, "messages", "conversations must be a list, found dict"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "messages", "human, user, gpt"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "messages", "a turn needs from"),
        ({"prompt": 3, "completion": "x"}, "prompt-completion", "prompt must be text, found int"),
        ({"prompt": "x", "completion": ["y"]}, "prompt-completion", "completion must be text, found list"),
        ({"instruction": "x", "output": 3}, "instruction", "output must be text, found int"),
        ({"text": ["x"]}, "text", "text must be text, found list"),
    ],
)
def test_bad_rows_are_told(row: dict[str, Any], kind: str, says: str) -> None:
    with pytest.raises(BadRow, match=says):
        to_example(row, kind, plain)


def test_messages_need_a_template() -> None:
    with pytest.raises(BadRow, match="no chat template"):
        to_example({"messages": chat("q", "a")}, "messages", None)

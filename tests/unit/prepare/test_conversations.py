"""Conversations in various formats: parts, roles, tool calls, and turns that are not learned."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.prepare.conversations import Reason
from launcher.prepare.row_formats import Reader
from launcher.prepare.row_values import BadRow
from tests.unit.prepare.chats import call, chat, learned, plain, reader, tool

PARTS = [{"type": "text", "text": "be", "image_url": None}, {"type": "text", "text": "ta"}]
QWEN = '<tool_call>\n{"name": "get", "arguments": %s}\n</tool_call><|im_end|>\n'


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma", "parts", "chatml", "harmony"])
def test_parts_are_joined_to_text(name: str) -> None:
    asked = [{"type": "text", "text": "alpha?"}]
    whole = reader(name).read({"messages": chat("alpha?", "beta")})
    assert reader(name).read({"messages": [message("user", asked), message("assistant", PARTS)]}) == whole
    assert learned(whole)[0].count("beta") == 1
    assert "alpha?" in whole.text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a part of type image_url"),
        ([{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {}}], "a part of type input_audio"),
        ([{"image": "x.png", "text": None}], "a part of type image"),
        ([{"type": "text", "text": {"a": 1}}], "content must be text: a text part has dict"),
        ([3], "found int in the list"),
        ({"answer": 42}, "content must be text, found dict"),
        (42, "content must be text, found int"),
        (True, "content must be text, found bool"),
    ],
)
def test_content_that_is_not_text_is_rejected(content: Any, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        reader("llama3").read({"messages": [message("user", "q"), message("assistant", content)]})


@pytest.mark.parametrize("text", ['{"a": 1}', "1.50", "null", "007", "NA", "[1, 2]", "true"])
def test_text_that_looks_like_json_stays_text(text: str) -> None:
    assert learned(reader("llama3").read({"messages": chat("q", text)})) == [f"{text}<|eot_id|>"]


@pytest.mark.parametrize("empty", [None, "", " \n", [], [{"type": "text", "text": ""}]])
def test_empty_answers_are_not_learned(empty: Any) -> None:
    row = {"messages": [message("user", "q"), message("assistant", empty)]}
    assert reader("llama3").read(row) is Reason.EMPTY_ANSWERS
    row["messages"] += chat("q2", "a2")
    assert learned(reader("llama3").read(row)) == ["a2<|eot_id|>"]


@pytest.mark.parametrize(
    "switch", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_turns_can_be_switched_off(switch: dict[str, Any]) -> None:
    messages = [
        message("user", "q1"),
        message("assistant", "a1", **switch),
        message("user", "q2"),
        message("assistant", "a2", weight=1),
    ]
    assert learned(Reader("messages", plain()).read({"messages": messages})) == ["a2<end>"]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **switch}]
    assert Reader("messages", plain()).read({"conversations": turns}) is Reason.SWITCHED_OFF


@pytest.mark.parametrize("values", [{"loss": 0.0}, {"loss": 2.5}, {"loss": True}, {"training": 1}])
def test_a_measured_loss_does_not_switch_a_turn_off(values: dict[str, Any]) -> None:
    found = Reader("messages", plain()).read({"messages": [message("user", "q"), message("assistant", "a", **values)]})
    assert learned(found) == ["a<end>"]


@pytest.mark.parametrize("switch", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}])
def test_invalid_switches_are_rejected(switch: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="must be"):
        Reader("messages", plain()).read({"messages": [message("user", "q"), message("assistant", "a", **switch)]})


@pytest.mark.parametrize("role", ["gpt", "human", "model", "bot", "observation", "narrator", "Assistant"])
def test_unknown_roles_of_messages_are_rejected(role: str) -> None:
    with pytest.raises(BadRow, match=f"^unknown role {role}, expected system, user, assistant, tool$"):
        reader("gemma").read({"messages": [message("user", "q"), message(role, "a")]})


@pytest.mark.parametrize(
    ("role", "standard"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("observation", "tool"),
        ("function", "tool"),
    ],
)
def test_sharegpt_roles_are_mapped_to_standard_roles(role: str, standard: str) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": role, "value": "x"}, {"from": "gpt", "value": "a"}]
    messages = [message("user", "q"), message(standard, "x"), message("assistant", "a")]
    assert Reader("messages", plain()).read({"conversations": turns}) == Reader("messages", plain()).read(
        {"messages": messages}
    )
    with pytest.raises(BadRow, match="unknown role alien, expected"):
        Reader("messages", plain()).read({"conversations": [{"from": "alien", "value": "x"}]})


def test_developer_and_function_get_the_name_that_the_template_uses() -> None:
    messages = [message("developer", "S"), *chat("q", "a")]
    assert "<|im_start|>system\nS" in reader("chatml").read({"messages": messages}).text  # type: ignore[union-attr]
    assert "# Instructions\nS" in reader("harmony").read({"messages": messages}).text  # type: ignore[union-attr]
    messages = [*chat("q"), call(), message("function", "7"), message("assistant", "a")]
    assert "<tool_response>\n7\n" in reader("qwen25").read({"messages": messages}).text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"city": "Paris"}', '{"city": "Paris"}'),
        ({"city": "Paris", "a": None}, '{"city": "Paris"}'),
        (
            {"where": {"city": "Paris", "a": None, "in": [{"b": None, "c": 1}]}},
            '{"where": {"city": "Paris", "in": [{"c": 1}]}}',
        ),
        ('{"unit": null}', '{"unit": null}'),
        ('{"n": 1.50, "s": "007"}', '{"n": 1.5, "s": "007"}'),
        ("", "{}"),
        ({}, "{}"),
    ],
)
@pytest.mark.parametrize("name", ["qwen25", "qwen3"])
def test_arguments_are_parsed_to_objects(name: str, arguments: Any, written: str) -> None:
    row = {"messages": [*chat("q"), call(arguments=arguments), message("tool", "7"), message("assistant", "a")]}
    assert learned(reader(name).read(row))[0] == QWEN % written


def test_nulls_are_kept_for_files_that_do_not_pad() -> None:
    row = {"messages": [*chat("q"), call(arguments={"unit": None})]}
    one = reader("qwen25")
    assert learned(Reader("messages", one.template, padded=False).read(row)) == [QWEN % '{"unit": null}']
    assert learned(one.read(row)) == [QWEN % "{}"]


def test_nulls_in_tools_are_removed_at_every_depth() -> None:
    row = {"messages": chat("q", "a"), "tools": [tool(strict=None, more={"x": None, "y": 1})]}
    text = reader("qwen25").read(row).text  # type: ignore[union-attr]
    assert '"more": {"y": 1}' in text
    assert "null" not in text


@pytest.mark.parametrize("key", ["arguments", "parameters", "input"])
def test_arguments_under_another_name_are_written(key: str) -> None:
    given = message("assistant", None, tool_calls=[{"name": "get", key: {"city": "Paris"}}])
    for name, written in (
        ("qwen25", QWEN % '{"city": "Paris"}'),
        ("always_prompt", '[get: {"city": "Paris"}]<|eot_id|>'),
    ):
        assert learned(reader(name).read({"messages": [message("user", "q"), given]})) == [written]


def test_calls_may_be_json_text_or_bare_functions() -> None:
    wanted = [QWEN % '{"city": "Paris"}']
    text = '[{"function": {"name": "get", "arguments": {"city": "Paris"}}}]'
    bare = [{"name": "get", "arguments": {"city": "Paris"}}]
    for calls in (text, bare, [text[1:-1]]):
        assert learned(reader("qwen25").read({"messages": [*chat("q"), call(tool_calls=calls)]})) == wanted
    old = message("assistant", None, function_call={"name": "get", "arguments": '{"city": "Paris"}'})
    assert learned(reader("qwen25").read({"messages": [*chat("q"), old]})) == wanted
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "7"},
    ]
    assert learned(reader("qwen25").read({"conversations": turns, "tools": "[]"})) == wanted


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("[…", "tool_calls is text that is not JSON"),
        ([{"function": {"name": "get", "arguments": "{…"}}], "arguments of get is text that is not JSON"),
        ([{"function": {"name": "get", "arguments": [1]}}], "arguments of get must be an object, found list"),
        ([{"function": {"arguments": {}}}], "needs a function with a name"),
        ([3], "a tool call must be an object, found int"),
    ],
)
def test_invalid_calls_are_rejected(calls: Any, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        reader("qwen25").read({"messages": [*chat("q"), call(tool_calls=calls)]})


def test_text_with_a_call_that_the_template_drops_is_reported() -> None:
    found = reader("llama3").read({"messages": [*chat("q"), call(content="Let me look.")]})
    assert learned(found) == ['{"name": "get", "parameters": {"city": "Paris"}}<|eot_id|>']
    assert found.shortened  # type: ignore[union-attr]
    kept = reader("qwen25").read({"messages": [*chat("q"), call(content="Let me look.")]})
    assert learned(kept) == ["Let me look.\n" + QWEN % '{"city": "Paris"}']

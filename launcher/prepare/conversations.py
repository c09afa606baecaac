"""Converts conversations from their various formats to the one that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from launcher.prepare.row_values import BadRow, from_json, kind_of, without_mark, without_nulls

Message = dict[str, Any]
Messages = list[Message]

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_SWITCHES = ("weight", "train", "training", "loss")
_ARGUMENTS = ("arguments", "parameters", "input")
_TEXT_PARTS = ("text", "input_text", "output_text")
_PLAIN_KEYS = {"role", "content"}


class Reason(StrEnum):
    """Why a row has nothing to learn."""

    EMPTY = "are empty"
    NO_ASSISTANT = "have no assistant turn"
    EMPTY_ANSWERS = "have only empty assistant turns"
    SWITCHED_OFF = "have weight 0 or train false on every assistant turn"
    NOT_FOUND = "have no assistant turn that can be found in the output of the chat template"
    CUT = "have nothing to learn within data.max_length"
    NO_TARGET = "are a single token"


@dataclass
class Conversation:
    """Messages for a chat template.

    `switched_off`: indices of the assistant turns that the row excludes (`weight: 0`, `train: false`).
    """

    messages: Messages
    switched_off: set[int] = field(default_factory=set)
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_learn(self, first: int = 0, only_last: bool = False) -> list[int] | Reason:
        """Indices of the learned assistant turns from message `first` on, or the reason why nothing is learned."""
        turns = [i for i, message in enumerate(self.messages) if i >= first and message["role"] == "assistant"]
        if not turns:
            return Reason.NO_ASSISTANT
        filled = [i for i in turns if has_content(self.messages[i])]
        if not filled:
            return Reason.EMPTY_ANSWERS
        if only_last:
            filled = filled[-1:]
        return [i for i in filled if i not in self.switched_off] or Reason.SWITCHED_OFF


def has_content(message: Message) -> bool:
    """Whether an assistant turn has text, reasoning or tool calls."""
    texts = (message.get(key) for key in ("content", *REASONING))
    return bool(message.get("tool_calls")) or any(isinstance(text, str) and text.strip() for text in texts)


def conversation_of(turns: list[Any], template: str, padded: bool = True) -> Conversation:
    """The checked turns of a row. Raises BadRow.

    `template` is the source of the chat template, which may define more roles. `padded`: the file format pads objects
    with null for the keys of other rows (parquet); these keys are removed.
    """
    conversation = Conversation([])
    for turn in turns:
        message, learned = _message(turn, template, padded)
        if not learned:
            conversation.switched_off.add(len(conversation.messages))
        conversation.messages.append(message)
    return conversation


def tools_of(value: Any, padded: bool = True) -> list[Any] | None:
    """The tools of a row, from a list of objects or JSON text; None if it has none. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    tools = from_json(value, "tools")
    if isinstance(tools, list):
        tools = [from_json(tool, "tools") if isinstance(tool, str) else _unpadded(tool, padded) for tool in tools]
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"tools must be a list of objects, found {str(value)[:60]!r}")
    return tools or None


def _message(turn: Any, template: str, padded: bool) -> tuple[Message, bool]:
    """(message, whether the row allows it to be learned)."""
    if type(turn) is dict and turn.keys() == _PLAIN_KEYS and turn["role"] in ROLES and type(turn["content"]) is str:
        return {**turn, "content": without_mark(turn["content"])}, True
    if not isinstance(turn, Mapping):
        raise BadRow(f"a message needs role and content, found {str(turn)[:80]!r}")
    message = {key: value for key, value in turn.items() if value is not None}
    message = _renamed(message) if "from" in message and "role" not in message else message
    role = message.get("role")
    if not isinstance(role, str) or not ({"content", "tool_calls", *REASONING} & {*message, *turn}):
        raise BadRow(f"a message needs role and content, found {str(turn)[:80]!r}")
    message["role"] = _role(role, template)
    learned = _is_learned(message)
    message = {key: value for key, value in message.items() if key not in _SWITCHES}
    message["content"] = content_text(message.get("content"))
    for key in REASONING:
        if key in message and not isinstance(message[key], str):
            raise BadRow(f"{key} must be text, found {kind_of(message[key])}")
    calls = _tool_calls(message, padded)
    if calls:
        message["tool_calls"] = calls
        if not message["content"]:
            del message["content"]
    else:
        message.pop("tool_calls", None)
    return message, learned


def content_text(content: Any) -> str:
    """A message's content as text; "" for null. Parts of a list are joined. Raises BadRow."""
    if content is None:
        return ""
    if isinstance(content, str):
        return without_mark(content)
    if isinstance(content, list):
        return without_mark("".join(_part_text(part) for part in content))
    raise BadRow(f"content must be text, found {kind_of(content)}: {str(content)[:60]}")


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise BadRow(f"content must be text or a list of text parts, found {kind_of(part)} in the list")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type", "text" if "text" in part else ", ".join(map(str, part)) or "nothing")
    if kind not in _TEXT_PARTS:
        raise BadRow(f"content has a part of type {kind}: only text parts are supported")
    text = part.get("text", "")
    if not isinstance(text, str):
        raise BadRow(f"content must be text: a text part has {kind_of(text)}")
    return text


def _renamed(turn: Message) -> Message:
    """A turn in ShareGPT's format (from, value) as a message."""
    sender, value = turn["from"], turn.get("value")
    if "value" not in turn and "content" not in turn and not turn.get("tool_calls"):
        raise BadRow(f"a turn needs from and value, found {str(turn)[:80]!r}")
    value = turn.get("content") if value is None else value
    role = _SHAREGPT.get(sender, sender) if isinstance(sender, str) else sender
    rest = {key: inner for key, inner in turn.items() if key not in ("from", "value")}
    if sender == "function_call":
        calls = from_json(value, "a function_call")
        return {**rest, "role": role, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**rest, "role": role, "content": value}


def _role(role: str, template: str) -> str:
    """The role under its standard name; other roles are allowed if the chat template names them. Raises BadRow."""
    if role in ROLES:
        return role
    if role not in _SHAREGPT.keys() - {"function"} and (f"'{role}'" in template or f'"{role}"' in template):
        return role
    standard = {"developer": "system", "function": "tool", "ipython": "tool"}.get(role)
    if standard is None:
        raise BadRow(f"unknown role {role}, expected {', '.join(ROLES)}")
    return standard


def _is_learned(message: Message) -> bool:
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (0, 1):
        raise BadRow(f"weight must be 0 or 1, found {weight!r}")
    if not isinstance(train, bool) and train not in (0, 1):
        raise BadRow(f"train must be true or false, found {train!r}")
    others = (message.get(key) for key in ("training", "loss"))  # a float loss is a measurement, not a switch
    return bool(weight) and bool(train) and not any(isinstance(one, int) and one == 0 for one in others)


def _tool_calls(message: Message, padded: bool) -> list[Message]:
    calls = from_json(message.get("tool_calls") or [], "tool_calls")
    if isinstance(message.get("function_call"), Mapping) and not calls:
        calls = [{"type": "function", "function": message.pop("function_call")}]
    if not isinstance(calls, list):
        raise BadRow(f"tool_calls must be a list, found {kind_of(calls)}")
    return [_tool_call(from_json(call, "tool_calls"), padded) for call in calls]


def _tool_call(call: Any, padded: bool) -> Message:
    """A call in OpenAI's format, with parsed arguments."""
    if not isinstance(call, Mapping):
        raise BadRow(f"a tool call must be an object, found {kind_of(call)}")
    call = {key: value for key, value in call.items() if value is not None}
    if "function" not in call:
        call = {"type": "function", "function": call}
    function = from_json(call["function"], "the function of a tool call")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"a tool call needs a function with a name, found {str(call)[:80]}")
    given = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None)
    if given is None or given == "":
        given = {}
    arguments = (
        from_json(given, f"arguments of {function['name']}") if isinstance(given, str) else _unpadded(given, padded)
    )
    if not isinstance(arguments, Mapping):
        raise BadRow(f"arguments of {function['name']} must be an object, found {kind_of(arguments)}")
    function = {key: value for key, value in function.items() if value is not None and key not in _ARGUMENTS}
    return {"type": "function", **call, "function": {**function, "arguments": dict(arguments)}}


def _unpadded(value: Any, padded: bool) -> Any:
    return without_nulls(value) if padded else value

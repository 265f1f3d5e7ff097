"""Conversations in one form: text contents, tool calls and results, for every model's template.

A template that knows tools writes them its own way. For all others there is a plain way: the tools stand in
the system message, one JSON object a line; a call is an answer of such lines; a result is what the user says
next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrag.errors import InputError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

CALLING = (
    "You can call functions. To call one, answer with nothing but a JSON object of the form "
    '{"name": <name>, "arguments": {<name of argument>: <value>}}, one a line for each call. '
    "The functions are:"
)
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that a model wants to be called.

    Attributes:
        name: of the function.
        arguments: by name.
    """

    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The call as a line of an answer."""
        return json.dumps({"name": self.name, "arguments": dict(self.arguments)}, ensure_ascii=False)


def normalized(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with contents of text, and calls as transformers' templates take them.

    Args:
        messages: with `role` and `content`: text, or a list of text parts, which become lines. Assistants may
            have `tool_calls`: `{"function": {"name": ..., "arguments": ...}}` as OpenAI has them, or
            `{"name": ..., "args": ...}`; arguments may be JSON.

    Raises:
        InputError: there is no message, or one that is not text.
    """
    if not messages:
        raise InputError("there are no messages; give at least one")
    found = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InputError(
                f"the model's chat template refuses these messages: one is {message!r}, not a dict"
            )
        plain = {**message, "content": flat(message.get("content"))}
        if calls := list(calls_of(message)):
            plain["tool_calls"] = [
                {
                    "type": "function",
                    "id": number,
                    "function": {"name": c.name, "arguments": dict(c.arguments)},
                }
                for number, c in calls
            ]
        else:
            plain.pop("tool_calls", None)
        found.append(plain)
    return found


def flat(content: Any) -> Any:
    """A message's content as text; parts are joined by line breaks.

    Raises:
        InputError: a part is no text.
    """
    if content is None:
        return ""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"a message has a part of type {kind}; this model reads text only")
    return "\n".join(parts)


def calls_of(message: Message) -> Iterator[tuple[str, ToolCall]]:
    """Ids and calls of a message.

    Raises:
        InputError: a call without a name, or whose arguments are no JSON object.
    """
    for i, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments", function.get("args")) or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise InputError(f"the arguments of a tool call are no JSON: {arguments!r}") from error
        if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
            raise InputError(f"a tool call is {call!r}; expected a name, and arguments by name")
        yield str(call.get("id") or f"call{i:05d}"), ToolCall(function["name"], arguments)


def specifications(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as templates take them: `{"type": "function", "function": {"name": ..., "parameters": ...}}`.

    Args:
        tools: in this form, or what stands inside `function` alone.

    Raises:
        InputError: a tool without a name.
    """
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function.get("name"), str):
            raise InputError(f"a tool is {tool!r}; expected a name, a description and a schema of parameters")
        found.append({"type": "function", "function": {"description": "", "parameters": {}, **function}})
    return found


def plain_tools(tools: Sequence[Tool]) -> str:
    """What a system message says of tools."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in specifications(tools)]
    return "\n".join([CALLING, *lines])


def plain_documents(documents: Sequence[Mapping[str, str]]) -> str:
    """What a system message says of documents: titles and texts as they are."""
    return "\n\n".join("\n".join(filter(None, (d.get("title"), d["text"]))) for d in documents)


def as_documents(documents: Sequence[str | Mapping[str, str]]) -> list[dict[str, str]]:
    """Documents as templates take them: `{"title": ..., "text": ...}`.

    Raises:
        InputError: one without text.
    """
    found = []
    for document in documents:
        whole = {"text": document} if isinstance(document, str) else dict(document)
        if not isinstance(whole.get("text"), str):
            raise InputError(f"a document is {document!r}; expected a text, or a dict with text and title")
        found.append({"title": "", **whole})
    return found


def plain_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation without tool roles: calls are what the assistant says, results what the user says.

    Args:
        messages: normalized.
    """
    names: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for message in messages:
        role, content = message.get("role"), message["content"]
        calls = list(calls_of(message))
        names |= {number: call.name for number, call in calls}
        content = "\n".join([*([content] if content else []), *(call.text for _, call in calls)])
        if role == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "the function")
            role, content = "user", f"Result of {name}:\n{content}"
        if found and role == found[-1]["role"] == "user":
            found[-1]["content"] += f"\n\n{content}"
        else:
            found.append({"role": role, "content": content})
    return found


def with_system(messages: Sequence[Message], said: str) -> list[dict[str, Any]]:
    """Messages whose system message, maybe a new one, ends with `said`."""
    if messages and messages[0].get("role") == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{said}"}
        return [first, *(dict(m) for m in messages[1:])]
    return [{"role": "system", "content": said}, *(dict(m) for m in messages)]


def from_user(messages: Sequence[Message], said: str) -> list[dict[str, Any]]:
    """Messages without system message: the first one from the user begins with what it said, and `said`."""
    lead = [m["content"] for m in messages if m.get("role") == "system"]
    rest = [dict(m) for m in messages if m.get("role") != "system"]
    if not rest or rest[0].get("role") != "user":
        rest.insert(0, {"role": "user", "content": ""})
    rest[0]["content"] = "\n\n".join(filter(None, [*lead, said, rest[0]["content"]]))
    return rest


def parse_calls(text: str) -> list[ToolCall]:
    """The calls that an answer consists of: lines of JSON, or JSON in `<tool_call>` tags; none if it is text.

    Arguments may be called parameters, as Llama does.
    """
    tagged = _TAGGED.findall(text)
    if not tagged and (alone := _call(text)) is not None:  # one call, maybe over several lines
        return [alone]
    pieces = tagged or [line for line in text.splitlines() if line.strip()]
    calls = [call for piece in pieces if (call := _call(piece)) is not None]
    return calls if len(calls) == len(pieces) else []


def _call(piece: str) -> ToolCall | None:
    try:
        made = json.loads(piece)
    except ValueError:
        return None
    if not isinstance(made, dict) or not isinstance(made.get("name"), str):
        return None
    arguments = made.get("arguments", made.get("parameters", {}))
    return ToolCall(made["name"], arguments) if isinstance(arguments, dict) else None

"""Tools and forms of answers: what LangChain binds, in the engine's terms, and calls in LangChain's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from langchain_core.messages import ToolCall as LangChainCall
from langchain_core.messages import ToolCallChunk
from langchain_core.messages.tool import tool_call, tool_call_chunk

from kvrag import ConfigError
from kvrag.calling import closed
from kvrag.constrain import Constraint, json_schema, tool_calls
from kvrag.messages import ToolCall

OPTIONS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")
"""What a call may say of tools and forms."""


@dataclass(frozen=True)
class Form:
    """What an answer may consist of.

    Attributes:
        tools: that the model is told of.
        constraint: the form that the answer has to have; None: any.
    """

    tools: tuple[dict[str, Any], ...] = ()
    constraint: Constraint | None = None


def form_of(options: dict[str, Any], max_chars: int | None) -> Form:
    """Takes what concerns tools and forms out of a call's options.

    Args:
        options: changed: what is left concerns others.
        max_chars: longest string in JSON; None: no end.

    Raises:
        ConfigError: a choice of a tool that is not there, or an unknown form.
        MissingExtra: a form has to be kept to, and llguidance is not installed.
    """
    tools, choice, several, response, _ = (options.pop(name, None) for name in OPTIONS)
    if choice == "none":
        tools = None
    if tools and choice not in {None, "auto"}:
        some = [tool for tool in tools if choice in {"any", tool["function"]["name"]}]
        if not some:
            raise ConfigError(
                f"tool_choice is {choice!r}; expected auto, any, none or the name of a bound tool"
            )
        return Form(tuple(tools), tool_calls(closed(some, max_chars), several=bool(several)))
    if response is not None:
        return Form(tuple(tools or ()), _response_form(response, max_chars))
    return Form(tuple(tools or ()))


def _response_form(response: Any, max_chars: int | None) -> Constraint:
    kind = response.get("type") if isinstance(response, dict) else response
    if kind == "json_object":
        return json_schema(closed({"type": "object"}, max_chars))
    if kind == "json_schema" and isinstance(response, dict):
        return json_schema(closed(response["json_schema"]["schema"], max_chars))
    raise ConfigError(f"response_format is {response!r}; expected json_object, or json_schema with a schema")


def choice_of(choice: Any, names: Sequence[str]) -> str | None:
    """A choice of tools in one form: "auto", "any", "none", a name, or None.

    Raises:
        ConfigError: it names no tool.
    """
    if isinstance(choice, dict):
        choice = choice.get("function", choice).get("name")
    if choice in {True, "required"}:
        choice = "any"
    if not choice:
        return None
    if choice not in {"auto", "any", "none", *names}:
        raise ConfigError(f"tool_choice is {choice!r}; expected auto, any, none or one of {', '.join(names)}")
    return str(choice)


def langchain_calls(calls: Sequence[ToolCall]) -> list[LangChainCall]:
    """Calls with ids of their own."""
    return [tool_call(name=c.name, args=dict(c.arguments), id=f"call_{uuid4().hex}") for c in calls]


def langchain_chunks(calls: Sequence[ToolCall]) -> list[ToolCallChunk]:
    """The same for a stream."""
    return [
        tool_call_chunk(name=c.name, args=json.dumps(dict(c.arguments)), id=f"call_{uuid4().hex}", index=n)
        for n, c in enumerate(calls)
    ]

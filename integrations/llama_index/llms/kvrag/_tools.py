"""Tools: what LlamaIndex offers, in the engine's terms, and calls in LlamaIndex's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from llama_index.core.base.llms.types import ToolCallBlock

from kvrag import ConfigError
from kvrag.calling import closed
from kvrag.constrain import Constraint, json_schema, tool_calls
from kvrag.messages import ToolCall

OPTIONS = ("tools", "tool_choice", "parallel_tool_calls", "json_schema")
"""What a call may say of tools and forms."""


@dataclass(frozen=True)
class Form:
    """What an answer may consist of.

    Attributes:
        tools: that the model is told of.
        several: more than one call is allowed.
        constraint: the form that the answer has to have; None: any.
    """

    tools: tuple[dict[str, Any], ...] = ()
    several: bool = False
    constraint: Constraint | None = None


def form_of(options: Mapping[str, Any], max_chars: int | None) -> Form:
    """What a call says of tools and forms.

    Args:
        options: of the call.
        max_chars: longest string in JSON; None: no end.

    Raises:
        ConfigError: a choice of a tool that is not there.
        MissingExtra: a form has to be kept to, and llguidance is not installed.
    """
    tools, choice, several, schema = (options.get(name) for name in OPTIONS)
    chosen = _choice(choice)
    if schema is not None:
        return Form(constraint=json_schema(closed(schema, max_chars)))
    if not tools or chosen == "none":
        return Form()
    if chosen == "auto":
        return Form(tuple(tools), bool(several))
    some = [tool for tool in tools if chosen in {"required", tool["function"]["name"]}]
    if not some:
        raise ConfigError(f"tool_choice is {choice!r}; expected auto, required, none or the name of a tool")
    # One call, also where several are allowed: a small model that may go on does not always find an end.
    return Form(tuple(tools), bool(several), tool_calls(closed(some, max_chars)))


def _choice(choice: Any) -> str:
    if isinstance(choice, Mapping):
        choice = choice.get("function", choice).get("name")
    return "required" if choice == "any" else str(choice or "auto")


def blocks_of(calls: Sequence[ToolCall]) -> list[ToolCallBlock]:
    """Calls with ids of their own."""
    return [
        ToolCallBlock(tool_call_id=f"call_{uuid4().hex}", tool_name=c.name, tool_kwargs=dict(c.arguments))
        for c in calls
    ]


def in_openai_form(blocks: Sequence[ToolCallBlock]) -> list[dict[str, Any]]:
    """Calls as dictionaries, arguments as JSON."""
    return [
        {
            "id": block.tool_call_id,
            "type": "function",
            "function": {"name": block.tool_name, "arguments": json.dumps(block.tool_kwargs)},
        }
        for block in blocks
    ]


def can_keep_to_forms() -> bool:
    """Whether answers can be held to tool calls."""
    return find_spec("llguidance") is not None

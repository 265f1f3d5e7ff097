"""From LangChain's messages to those of a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, ToolMessage

from kvrag import InputError

_ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool", "function": "tool"}
_SILENT = {
    "reasoning",
    "thinking",
    "tool_use",
    "tool_call",
    "invalid_tool_call",
}  # said elsewhere, or not again


def template_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Roles, texts and tool calls, in order.

    Raises:
        InputError: a message holds something that is not text.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: BaseMessage) -> dict[str, Any]:
    kind = message.type.removesuffix("MessageChunk").lower()
    role = message.role if isinstance(message, ChatMessage) else _ROLES.get(kind)
    if role is None:
        raise InputError(f"messages of type {message.type!r} have no role in a chat template")
    made: dict[str, Any] = {"role": role, "content": text_of(message)}
    if isinstance(message, AIMessage) and message.tool_calls:
        made["tool_calls"] = [
            {
                "type": "function",
                "id": call["id"] or "",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        made["tool_call_id"] = message.tool_call_id
    if kind in {"tool", "function"} and message.name:
        made["name"] = message.name
    return made


def text_of(message: BaseMessage) -> str:
    """A message's text; blocks of text are joined.

    Raises:
        InputError: it holds an image, a sound or a file.
    """
    if isinstance(message.content, str):
        return message.content
    return "".join(_text_of_block(block) for block in message.content)


def _text_of_block(block: str | dict[Any, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind in {"text", "text-plain"} and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in _SILENT:
        return ""
    if kind == "tool_result" and isinstance(block.get("content"), (str, list)):
        inner = block["content"]
        return inner if isinstance(inner, str) else "".join(map(_text_of_block, inner))
    raise InputError(f"a message holds a block of type {kind!r}; this model reads text only")


def documents_in(messages: Iterable[BaseMessage]) -> list[Document]:
    """Documents that tools returned beside their text."""
    found: list[Document] = []
    for message in messages:
        if isinstance(message, ToolMessage):
            artifact = message.artifact
            items = artifact if isinstance(artifact, (list, tuple)) else [artifact]
            found += [item for item in items if isinstance(item, Document)]
    return found

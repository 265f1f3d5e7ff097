"""From LlamaIndex's messages to those of a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    DocumentBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms import ChatMessage, MessageRole

from kvrag import InputError

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Roles, texts and tool calls, in order.

    Raises:
        InputError: a message holds something that is not text.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    role = _ROLES.get(message.role, message.role.value)
    made: dict[str, Any] = {"role": role, "content": text_of(message)}
    calls = [_call(block) for block in message.blocks if isinstance(block, ToolCallBlock)]
    if calls:
        made["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        if role == "tool" and isinstance(message.additional_kwargs.get(name), str):
            made[name] = message.additional_kwargs[name]
    return made


def _call(block: ToolCallBlock) -> dict[str, Any]:
    arguments = block.tool_kwargs
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InputError(
                f"the call of {block.tool_name} has arguments that are no JSON: {error}"
            ) from error
    return {
        "type": "function",
        "id": block.tool_call_id or "",
        "function": {"name": block.tool_name, "arguments": arguments},
    }


def text_of(message: ChatMessage) -> str:
    """A message's text; blocks of text stand on lines of their own, as LlamaIndex joins them.

    Raises:
        InputError: it holds an image, a sound or a file.
    """
    return "\n".join(text for block in message.blocks if (text := _text_of_block(block)) is not None)


def _text_of_block(block: ContentBlock) -> str | None:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, (CachePoint, ThinkingBlock, ToolCallBlock)):
        return None  # says nothing, or says it elsewhere
    if isinstance(block, CitableBlock):
        return "\n".join(t for inner in block.content if (t := _text_of_block(inner)) is not None)
    if isinstance(block, CitationBlock):
        return _text_of_block(block.cited_content)
    kind = "document" if isinstance(block, DocumentBlock) else block.block_type
    raise InputError(f"a message holds a block of type {kind!r}; this model reads text only")

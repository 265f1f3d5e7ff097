"""Tool calls in an answer as it is written: text is shown as it comes, calls when they are whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvrag.messages import Tool, ToolCall, parse_calls, specifications

_TAG = "<tool_call>"


class CallWatch:
    """Tells calls from text while an answer is written.

    An answer that begins with a brace may be a call, and is held back as a whole; so is everything from a
    `<tool_call>` tag on. What turns out to be no call of a known tool is text.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Watch for calls of these tools; with none, all is text."""
        self._names = {tool["function"]["name"] for tool in specifications(tools)}
        self._text = ""
        self._shown = 0

    def push(self, piece: str) -> str:
        """Add a piece of the answer; the text that can be shown now."""
        self._text += piece
        return self._release(len(self._text) - self._held())

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls, once the answer is complete."""
        calls = parse_calls(self._text) if self._names else []
        if not calls or any(call.name not in self._names for call in calls):
            return self._release(len(self._text)), []
        at = self._text.find(_TAG)
        return self._release(at).rstrip() if at > self._shown else "", calls

    def _release(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]

    def _held(self) -> int:
        """How much of the end may belong to a call."""
        start = self._text.lstrip()
        if not self._names or not start:
            return len(self._text) if self._names else 0
        if start.startswith("{"):
            return len(self._text)
        if (at := self._text.find(_TAG)) >= 0:
            return len(self._text) - at
        tails = range(min(len(_TAG) - 1, len(self._text)), 0, -1)
        return next((n for n in tails if _TAG.startswith(self._text[-n:])), 0)


def closed(schema: Any, max_chars: int | None = None) -> Any:
    """A JSON schema for a model to keep to: nothing is added to objects that name their properties.

    Args:
        schema: any part of one; where it says itself what may be added, it is left alone.
        max_chars: longest string, for models that may not find a string's end; None: as the schema says.
            Strings that have a form already keep it.
    """
    if isinstance(schema, list):
        return [closed(item, max_chars) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {name: closed(value, max_chars) for name, value in schema.items()}
    if made.get("type") == "object" and made.get("properties"):
        made.setdefault("additionalProperties", False)
    has_form = {"enum", "const", "pattern", "format", "maxLength"} & made.keys()
    if made.get("type") == "string" and not has_form and max_chars is not None:
        made["maxLength"] = max_chars
    return made

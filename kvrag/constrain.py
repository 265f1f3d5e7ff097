"""Answers that keep to a form: a JSON schema, a regular expression, some choices or a grammar.

The work is llguidance's (extra `constrained`): before every token it says which ones can follow, the others
get no probability. Special tokens are never among them, unless a Lark grammar names one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrag.errors import ConfigError, MissingExtra

_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A form that an answer has to have; equal ones are compiled once.

    Attributes:
        grammar: in llguidance's form.
    """

    grammar: str


def json_schema(schema: Mapping[str, Any] | str | bool) -> Constraint:
    """JSON of a schema (draft 2020-12, as far as llguidance has it), properties in the schema's order.

    White space is as `json.dumps` writes it, on one line; `x-guidance` in the schema can change that.

    Raises:
        ConfigError: no schema, or one with parts that cannot be kept to.
        MissingExtra: llguidance is not installed.
    """
    matcher = library().LLMatcher
    if isinstance(schema, str):
        text = schema
    else:
        try:
            text = json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the schema is no JSON: {error}") from error
    try:
        grammar = matcher.grammar_from_json_schema(text, _AS_WRITTEN)
    except ValueError as error:
        raise ConfigError(f"the schema is no JSON: {error}") from error
    return _checked(grammar, "this schema")


def regex(pattern: str) -> Constraint:
    """Text that a regular expression matches from beginning to end (Rust's syntax, no look-around).

    Raises:
        ConfigError: the expression is wrong, or looks around.
        MissingExtra: llguidance is not installed.
    """
    return _checked(library().LLMatcher.grammar_from_regex(pattern), "this regular expression")


def choice(texts: Sequence[str]) -> Constraint:
    """One of some texts, word for word.

    Raises:
        ConfigError: there are no texts, or an empty one.
        MissingExtra: llguidance is not installed.
    """
    if isinstance(texts, str) or not texts or not all(texts):
        raise ConfigError(f"choices are {texts!r}; expected a list of texts that are not empty")
    return lark("start: " + " | ".join(json.dumps(text) for text in dict.fromkeys(texts)))


def lark(grammar: str) -> Constraint:
    """Text of a context-free grammar in llguidance's variant of Lark's notation, from the rule `start`.

    Raises:
        ConfigError: the grammar cannot be compiled.
        MissingExtra: llguidance is not installed.
    """
    return _checked(library().LLMatcher.grammar_from_lark(grammar), "this grammar")


def tool_calls(tools: Sequence[Mapping[str, Any]], *, several: bool = False) -> Constraint:
    """Calls of tools, as `kvrag.messages.parse_calls` reads them: one, or several, one a line.

    Args:
        tools: `{"name": ..., "parameters": <JSON schema>}` each, or `{"function": <the same>}`.
        several: allow more than one call.

    Raises:
        ConfigError: there are no tools, or parameters that cannot be kept to.
        MissingExtra: llguidance is not installed.
    """
    functions = [tool.get("function", tool) for tool in tools]
    if not functions:
        raise ConfigError("there are no tools to call; give at least one")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": {"type": "object", **(function.get("parameters") or {})},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema = json.dumps({"anyOf": calls, "x-guidance": _AS_WRITTEN}, ensure_ascii=False)
    rest = ' ("\\n" call)*' if several else ""
    return lark(f"start: call{rest}\ncall: %json {schema}")


def library() -> Any:
    """Llguidance.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import llguidance  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra("llguidance", "constrained") from error
    return llguidance


def _checked(grammar: str, what: str) -> Constraint:
    if reason := library().LLMatcher.validate_grammar(grammar):
        raise ConfigError(f"{what} cannot be kept to: {' '.join(reason.split())}")
    return Constraint(grammar)

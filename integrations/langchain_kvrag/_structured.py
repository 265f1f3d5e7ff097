"""Structured output: which form the model keeps to, and who reads it."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from kvrag import ConfigError


def structured(model: Any, schema: Any, method: str, *, include_raw: bool, strict: bool | None) -> Any:
    """A runnable whose answers have the schema's form.

    Args:
        model: a chat model that can bind tools and forms.
        schema: of pydantic, a TypedDict, a JSON schema or an OpenAI tool.
        method: "json_schema" and "json_mode" write JSON, "function_calling" calls a tool; "json_mode"
            needs no schema: without one, any object is written.
        include_raw: give the message as well, and errors of parsing instead of raising them.
        strict: of no consequence: forms are always kept to.

    Raises:
        ConfigError: an unknown method, or one that needs a schema without one.
    """
    if schema is None and method != "json_mode":
        raise ConfigError(f"method {method!r} needs a schema")
    kept, parser = _kept(model, schema, method, strict)
    return _with_raw(kept, parser) if include_raw else kept | parser


def _kept(model: Any, schema: Any, method: str, strict: bool | None) -> tuple[Any, Runnable[Any, Any]]:
    """The model bound to a form, and what reads its answers."""
    told = {
        "ls_structured_output_format": {
            "kwargs": {"method": method, "strict": strict},
            "schema": None if schema is None else convert_to_json_schema(schema),
        }
    }
    is_pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        if is_pydantic:
            parser: Any = PydanticToolsParser(tools=[schema], first_tool_only=True)
        else:
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        return model.bind_tools([schema], tool_choice=name, **told), parser
    if method not in {"json_schema", "json_mode"}:
        raise ConfigError(f"method is {method!r}; expected json_schema, function_calling or json_mode")
    if schema is not None:
        form: dict[str, Any] = {
            "type": "json_schema",
            "json_schema": {"schema": convert_to_json_schema(schema)},
        }
    else:
        form = {"type": "json_object"}
    parser = PydanticOutputParser(pydantic_object=schema) if is_pydantic else JsonOutputParser()
    return model.bind(response_format=form, **told), parser


def _with_raw(kept: Any, parser: Any) -> Any:
    """The message, what was read from it, and what went wrong, as LangChain's own models give them."""
    reading = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=kept) | reading.with_fallbacks([failed], exception_key="parsing_error")

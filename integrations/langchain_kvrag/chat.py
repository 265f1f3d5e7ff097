"""The chat model: LangChain's messages in, an answer from prebuilt caches out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, model_validator

from kvrag import Answer, AnswerStream, ConfigError, InputError, Piece
from kvrag.calling import CallWatch
from kvrag.ingested import known_of
from langchain_kvrag._messages import documents_in, template_messages
from langchain_kvrag._results import logprobs_of, usage_of
from langchain_kvrag._serving import Serving, finished, package_version
from langchain_kvrag._structured import structured
from langchain_kvrag._tools import choice_of, form_of, langchain_calls, langchain_chunks


class ChatKVCache(Serving, BaseChatModel):
    """A chat model that reads retrieved documents from prebuilt KV caches.

    Documents that a retriever returned, that `KVChroma` holds, or that were read before are found in the
    prompt by their text, wherever a chain has put them. Nothing else of a chain changes.

    >>> from langchain_kvrag import ChatKVCache  # doctest: +SKIP
    >>> model = ChatKVCache(model="Qwen/Qwen2.5-7B-Instruct", store="caches")  # doctest: +SKIP
    >>> model.invoke("Why is the sky blue?").usage_metadata  # doctest: +SKIP

    With `sessions`, a conversation keeps a memory that does not grow, and only what is new in it is read:

    >>> model = ChatKVCache(sessions="chats", memory="cascade", memory_budget=4096)  # doctest: +SKIP
    >>> model.invoke(history, {"configurable": {"thread_id": "jane"}})  # doctest: +SKIP

    What came from caches stands in `usage_metadata["input_token_details"]["cache_read"]`, and in
    `response_metadata["kvrag"]` with each document's share of the attention; under `memory` what a session's
    turn has read and still remembers.
    """

    @model_validator(mode="after")
    def _set_kvrag_version(self) -> Self:
        self._add_version("langchain-kvrag", package_version())
        return self

    @property
    def _llm_type(self) -> str:
        return "kvrag-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        limit = self.running.model.max_length
        return ModelProfile(
            max_input_tokens=limit,
            max_output_tokens=min(limit, self.max_tokens),
            text_inputs=True,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
        )

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "kvrag"
        return params

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Tokens of a conversation as the chat template writes it."""
        return len(self.get_token_ids(self._render(messages, tools)))

    def _render(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> str:
        """The prompt, with an answer about to begin.

        Raises:
            InputError: the model has no chat template, or it refuses these messages.
        """
        told = [convert_to_openai_tool(tool) for tool in tools or ()]
        return self.running.render(self._history(messages), tools=told or None)

    def _history(self, messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
        """Messages for the chat template.

        Raises:
            InputError: the model has no chat template, or a message is not text.
        """
        if not self.running.model.text.has_template:
            raise InputError(f"{self.model} has no chat template; use KVCacheLLM, which takes text")
        return template_messages(messages)

    # ---- tools and forms

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tell the model of tools.

        Args:
            tools: LangChain tools, functions, pydantic classes or schemas.
            tool_choice: "auto" leaves it to the model; "any", or a tool's name, makes it call one: its answer
                is then kept to the form of such a call; "none" forbids it.
            kwargs: bound as well, such as `parallel_tool_calls=True` for several calls in one answer.
        """
        told = [convert_to_openai_tool(tool) for tool in tools]
        choice = choice_of(tool_choice, [tool["function"]["name"] for tool in told])
        if choice is not None:
            kwargs["tool_choice"] = choice
        return self.bind(tools=told, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Answers that have a schema's form, because no token is chosen that would break it.

        Args:
            schema: of pydantic, a TypedDict, a JSON schema or an OpenAI tool; only "json_mode" needs none.
            method: "json_schema" and "json_mode" write JSON, "function_calling" calls a tool.
            include_raw: give the message as well, and errors of parsing instead of raising them.
            strict: of no consequence: forms are always kept to.
            kwargs: none is known.

        Raises:
            ConfigError: an unknown method or argument.
        """
        if kwargs:
            raise ConfigError(f"with_structured_output knows no argument {next(iter(kwargs))!r}")
        made: Runnable[LanguageModelInput, dict[str, Any] | BaseModel] = structured(
            self, schema, method, include_raw=include_raw, strict=strict
        )
        return made

    # ---- answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, kwargs, run_manager)
        with asked.stream as stream:
            for _ in stream:
                pass
            return asked.result(finished(stream))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, kwargs, run_manager)
        with asked.stream as stream:
            async for _ in stream:
                pass
            return asked.result(finished(stream))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked = self._asked(messages, stop, kwargs, run_manager)
        with asked.stream as stream:
            for piece in stream.events():
                if chunk := asked.chunk(piece):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
            yield asked.last_chunk(finished(stream))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        asked = self._asked(messages, stop, kwargs, run_manager)
        with asked.stream as stream:
            async with aclosing(stream.aevents()) as pieces:
                async for piece in pieces:
                    if chunk := asked.chunk(piece):
                        if run_manager:
                            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk
            yield asked.last_chunk(finished(stream))

    def _asked(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: dict[str, Any],
        run_manager: Any,
    ) -> _Asked:
        """An answer that is about to begin."""
        documents = documents_in(messages)
        if documents:
            known_of(self.running).see([document.page_content for document in documents])
        form = form_of(options, self.max_json_chars)
        session = self._session_of(options, run_manager)
        call = self._call(stop, options, form.constraint)
        run_id = run_manager.run_id if run_manager else None
        if session is None:
            stream = self._ask(self._render(messages, form.tools), call)
        else:
            stream = self._reply(session, self._history(messages), call, form.tools)

        def about(answer: Answer) -> dict[str, Any]:
            told = self._tell(answer, run_id, documents)
            if session is not None:
                told["session"] = session.name
            named = {"model_name": self.model, "model_provider": "kvrag", "kvrag": told}
            return {**named, "finish_reason": answer.finish_reason}

        return _Asked(stream, CallWatch(form.tools), about)


@dataclass
class _Asked:
    """One answer on its way to LangChain.

    Attributes:
        stream: to be entered once.
        watch: tells calls from text.
        about: what the message says of a finished answer.
    """

    stream: AbstractContextManager[AnswerStream]
    watch: CallWatch
    about: Callable[[Answer], dict[str, Any]]

    def result(self, answer: Answer) -> ChatResult:
        """The whole answer as a message."""
        text = self.watch.push(answer.text)
        rest, calls = self.watch.finish()
        message = AIMessage(
            content=text + rest,
            tool_calls=langchain_calls(calls),
            usage_metadata=usage_of(answer),
            response_metadata={**self.about(answer), **logprobs_of(answer.logprobs)},
        )
        made = ChatGeneration(message=message, generation_info={"finish_reason": answer.finish_reason})
        return ChatResult(
            generations=[made], llm_output={"model_name": message.response_metadata["model_name"]}
        )

    def chunk(self, piece: Piece) -> ChatGenerationChunk | None:
        """A piece of the answer; None if there is nothing to say yet."""
        text, logprobs = self.watch.push(piece.text), logprobs_of(piece.logprobs)
        if not text and not logprobs:
            return None
        return ChatGenerationChunk(message=AIMessageChunk(content=text, response_metadata=logprobs))

    def last_chunk(self, answer: Answer) -> ChatGenerationChunk:
        """What is known at the end only; counts are here and nowhere else."""
        rest, calls = self.watch.finish()
        message = AIMessageChunk(
            content=rest,
            tool_call_chunks=langchain_chunks(calls),
            usage_metadata=usage_of(answer),
            response_metadata=self.about(answer),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

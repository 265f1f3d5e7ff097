"""The chat model: LangChain's messages in, an answer from prebuilt caches out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import BaseTool
from pydantic import model_validator

from kvrag import Answer, InputError
from langchain_kvrag._known import known_of
from langchain_kvrag._messages import documents_in, template_messages
from langchain_kvrag._results import report, usage_of
from langchain_kvrag._serving import Serving, finished, package_version


class ChatKVCache(Serving, BaseChatModel):
    """A chat model that reads retrieved documents from prebuilt KV caches.

    Documents that a retriever returned, that `KVChroma` holds, or that were read before are found in the
    prompt by their text, wherever a chain has put them. Nothing else of a chain changes.

    >>> from langchain_kvrag import ChatKVCache  # doctest: +SKIP
    >>> model = ChatKVCache(model="Qwen/Qwen2.5-7B-Instruct", store="caches")  # doctest: +SKIP
    >>> model.invoke("Why is the sky blue?").usage_metadata  # doctest: +SKIP

    What came from caches stands in `usage_metadata["input_token_details"]["cache_read"]`, and in
    `response_metadata["kvrag"]` with each document's share of the attention.
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
        text = self.running.model.text
        if not text.has_template:
            raise InputError(f"{self.model} has no chat template; use KVCacheLLM, which takes text")
        return text.render(template_messages(messages))

    # ---- answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._asked(messages, stop, kwargs) as stream:
            for _ in stream:
                pass
            return self._result(messages, finished(stream), run_manager)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._asked(messages, stop, kwargs) as stream:
            async for _ in stream:
                pass
            return self._result(messages, finished(stream), run_manager)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._asked(messages, stop, kwargs) as stream:
            for piece in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield self._last_chunk(messages, finished(stream), run_manager)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with self._asked(messages, stop, kwargs) as stream:
            async for piece in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield self._last_chunk(messages, finished(stream), run_manager)

    def _asked(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> Any:
        """An answer under way, to be used in a `with` block."""
        told = [document.page_content for document in documents_in(messages)]
        if told:
            known_of(self.running).see(told)
        return self._ask(self._render(messages), self._call(stop, options), is_rendered=True)

    def _result(self, messages: Sequence[BaseMessage], answer: Answer, run_manager: Any) -> ChatResult:
        self._explain(answer, run_manager and run_manager.run_id, documents_in(messages))
        message = AIMessage(
            content=answer.text, usage_metadata=usage_of(answer), response_metadata=self._about(answer)
        )
        made = ChatGeneration(message=message, generation_info={"finish_reason": answer.finish_reason})
        return ChatResult(generations=[made], llm_output={"model_name": self.model})

    def _last_chunk(
        self, messages: Sequence[BaseMessage], answer: Answer, run_manager: Any
    ) -> ChatGenerationChunk:
        self._explain(answer, run_manager and run_manager.run_id, documents_in(messages))
        last: Literal["last"] = "last"
        message = AIMessageChunk(
            content="",
            usage_metadata=usage_of(answer),
            response_metadata=self._about(answer),
            chunk_position=last,
        )
        return ChatGenerationChunk(message=message, generation_info={"finish_reason": answer.finish_reason})

    def _about(self, answer: Answer) -> dict[str, Any]:
        return {"model_name": self.model, "model_provider": "kvrag", "kvrag": report(answer)}

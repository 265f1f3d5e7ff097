"""The text model, for chains that complete a text instead of answering messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing
from typing import Any, ClassVar, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import model_validator

from kvrag import Answer, AnswerStream
from langchain_kvrag._results import logprobs_of, usage_of
from langchain_kvrag._serving import Serving, finished, package_version


class KVCacheLLM(Serving, BaseLLM):
    """A text-completion model that reads retrieved documents from prebuilt KV caches.

    The prompt is what the model sees, without a chat template: for a model that was trained to chat,
    `ChatKVCache` gives better answers. Both find the same caches.

    >>> from langchain_kvrag import KVCacheLLM  # doctest: +SKIP
    >>> KVCacheLLM(model="kvrag/reader", store="caches").invoke("...")  # doctest: +SKIP
    """

    _is_rendered: ClassVar[bool] = False

    @model_validator(mode="after")
    def _set_kvrag_version(self) -> Self:
        self._add_version("langchain-kvrag", package_version())
        return self

    @property
    def _llm_type(self) -> str:
        return "kvrag"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "kvrag"
        return params

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """All prompts are under way at once; the engine's thread decodes them together."""
        call = self._call(stop, kwargs)
        with ExitStack() as stack:
            streams = [stack.enter_context(self._ask(p, call)) for p in prompts]
            answers = []
            for stream in streams:
                for _ in stream:
                    pass
                answers.append(finished(stream))
        return self._result(answers, run_manager)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """The same without blocking the event loop."""
        call = self._call(stop, kwargs)
        with ExitStack() as stack:
            streams = [stack.enter_context(self._ask(p, call)) for p in prompts]
            answers = await asyncio.gather(*(_acomplete(stream) for stream in streams))
        return self._result(answers, run_manager)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with self._ask(prompt, self._call(stop, kwargs)) as stream:
            for piece in stream.events():
                chunk = GenerationChunk(text=piece.text, generation_info=logprobs_of(piece.logprobs))
                if run_manager:
                    run_manager.on_llm_new_token(piece.text, chunk=chunk)
                yield chunk
            yield GenerationChunk(text="", generation_info=self._about(finished(stream), run_manager))

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        with self._ask(prompt, self._call(stop, kwargs)) as stream:
            async with aclosing(stream.aevents()) as pieces:
                async for piece in pieces:
                    chunk = GenerationChunk(text=piece.text, generation_info=logprobs_of(piece.logprobs))
                    if run_manager:
                        await run_manager.on_llm_new_token(piece.text, chunk=chunk)
                    yield chunk
            yield GenerationChunk(text="", generation_info=self._about(finished(stream), run_manager))

    def _result(self, answers: list[Answer], run_manager: Any) -> LLMResult:
        usages = [usage_of(answer) for answer in answers]
        return LLMResult(
            generations=[
                [
                    Generation(
                        text=a.text,
                        generation_info={**self._about(a, run_manager), **logprobs_of(a.logprobs)},
                    )
                ]
                for a in answers
            ],
            llm_output={
                "model_name": self.model,
                "token_usage": {
                    "prompt_tokens": sum(usage["input_tokens"] for usage in usages),
                    "completion_tokens": sum(usage["output_tokens"] for usage in usages),
                    "total_tokens": sum(usage["total_tokens"] for usage in usages),
                },
            },
        )

    def _about(self, answer: Answer, run_manager: Any) -> dict[str, Any]:
        return {
            "finish_reason": answer.finish_reason,
            "model_name": self.model,
            "usage_metadata": usage_of(answer),
            "kvrag": self._tell(answer, run_manager and run_manager.run_id),
        }


async def _acomplete(stream: AnswerStream) -> Answer:
    async for _ in stream:
        pass
    return finished(stream)

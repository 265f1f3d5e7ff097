"""The text model, for chains that complete a text instead of answering messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing
from functools import partial
from typing import Any, ClassVar, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable
from pydantic import model_validator

from kvrag import Answer, AnswerStream
from langchain_kvrag._results import logprobs_of, usage_of
from langchain_kvrag._serving import Serving, finished, package_version


class KVCacheLLM(Serving, BaseLLM):
    """A text-completion model that reads retrieved documents from prebuilt KV caches.

    The prompt is what the model sees, without a chat template: for a model that was trained to chat,
    `ChatKVCache` gives better answers. Both find the same caches.

    With a session (see `Serving`), a prompt is the whole text so far: only what it adds to the text before is
    read. Several prompts in one `generate` have no session.

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
        begin = self._begin(stop, kwargs, run_manager, is_alone=len(prompts) == 1)
        with ExitStack() as stack:
            streams = [stack.enter_context(begin(p)) for p in prompts]
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
        begin = self._begin(stop, kwargs, run_manager, is_alone=len(prompts) == 1)
        with ExitStack() as stack:
            streams = [stack.enter_context(begin(p)) for p in prompts]
            answers = await asyncio.gather(*(_acomplete(stream) for stream in streams))
        return self._result(answers, run_manager)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with self._begin(stop, kwargs, run_manager)(prompt) as stream:
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
        with self._begin(stop, kwargs, run_manager)(prompt) as stream:
            async with aclosing(stream.aevents()) as pieces:
                async for piece in pieces:
                    chunk = GenerationChunk(text=piece.text, generation_info=logprobs_of(piece.logprobs))
                    if run_manager:
                        await run_manager.on_llm_new_token(piece.text, chunk=chunk)
                    yield chunk
            yield GenerationChunk(text="", generation_info=self._about(finished(stream), run_manager))

    def _begin(
        self, stop: list[str] | None, options: dict[str, Any], run_manager: Any, *, is_alone: bool = True
    ) -> Callable[[str], AbstractContextManager[AnswerStream]]:
        """What starts an answer to a prompt."""
        session = self._session_of(options, run_manager)
        call = self._call(stop, options)
        if session is None or not is_alone:
            return partial(self._ask, call=call)
        return partial(self._reply, session, call=call)

    # LangChain hands several prompts over at once, as if they were of one run; turns are of several.

    def batch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[Any]:
        """The answers to several prompts, each with the session of its own configuration."""
        each: Callable[..., list[Any]] = (
            partial(Runnable.batch, self) if self._is_in_sessions else super().batch
        )
        return each(inputs, config, **kwargs)

    async def abatch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[Any]:
        """The same without blocking the event loop."""
        each: Any = partial(Runnable.abatch, self) if self._is_in_sessions else super().abatch
        found: list[Any] = await each(inputs, config, **kwargs)
        return found

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

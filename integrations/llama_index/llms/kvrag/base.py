"""The model: LlamaIndex's prompts and messages in, an answer from prebuilt caches out."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import NodeWithScore

from kvrag import Answer, AnswerStream, ConfigError, GenerationCancelled, Policy, Sampling
from kvrag.explain import why_not
from kvrag.focus.policy import preset
from llama_index.llms.kvrag._engine import EngineFields
from llama_index.llms.kvrag._hints import RETRIEVED, pasted, serve, write_back
from llama_index.llms.kvrag._known import key_of, known_of
from llama_index.llms.kvrag._messages import template_messages
from llama_index.llms.kvrag._results import counts_of, raw_of

logger = logging.getLogger("llama_index.llms.kvrag")

# pydantic would look into the policies' dataclasses, and need not: they check themselves.
if TYPE_CHECKING:
    _PolicyOrName = Policy | str
else:
    _PolicyOrName = Any

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_OPTIONS = frozenset({*_SAMPLING, "max_tokens", "stop", "policy"})


@dataclass(frozen=True)
class _Asked:
    """An answer under way, and the nodes that it is about."""

    stream: AnswerStream
    nodes: Sequence[NodeWithScore]
    model: str

    def finish(self) -> Answer:
        """The whole answer; what it made of the nodes is written into them.

        Raises:
            GenerationCancelled: it was stopped.
        """
        answer = self.stream.answer
        if answer is None:
            raise GenerationCancelled("the answer was cancelled")
        write_back(self.nodes, raw_of(answer, self.model)["kvrag"]["documents"])
        self._explain(answer)
        return answer

    def _explain(self, answer: Answer) -> None:
        """One line about retrieved nodes that are not among the answer's cached ones."""
        if not (self.nodes and logger.isEnabledFor(logging.DEBUG)):
            return
        found = {use.key for use in answer.documents}
        missed = [text for node in self.nodes if key_of(text := pasted(node.node)) not in found]
        if missed:
            reasons = (f"{text[:32]!r}: {why_not(answer.plan, text, min_chars=16)}" for text in missed)
            logger.debug("%d retrieved nodes were not used from caches: %s", len(missed), "; ".join(reasons))


class KVCacheLLM(EngineFields, LLM):
    """A local model that reads retrieved nodes from prebuilt KV caches.

    Nodes that a retriever returned, that `KVCacheTransform` built caches for, or that were read before are
    found in the prompt by their text, wherever a synthesizer has put them. Nothing else changes.

    >>> from llama_index.llms.kvrag import KVCacheLLM  # doctest: +SKIP
    >>> llm = KVCacheLLM(model="Qwen/Qwen2.5-7B-Instruct", store="caches")  # doctest: +SKIP
    >>> index.as_query_engine(llm=llm).query("Why is the sky blue?")  # doctest: +SKIP

    What came from caches stands in a response's `raw["usage"]["prompt_tokens_details"]["cached_tokens"]`, and
    in `raw["kvrag"]` with each document's share of the attention.
    """

    policy: _PolicyOrName = Field(
        default="", description="What is done with documents: a policy or its name; empty: the engine's."
    )
    caches: bool = Field(default=True, description="False reads every prompt as a whole, for comparisons.")
    context_window: int | None = Field(
        default=None, description="What LlamaIndex is told that fits; None: the model's limit."
    )
    is_chat_model: bool | None = Field(
        default=None, description="Whether prompts become messages; None: if there is a chat template."
    )
    temperature: float = Field(default=0.0, description="0 is greedy.")
    max_tokens: int = Field(default=256, description="Longest answer in tokens.")
    top_k: int | None = Field(default=None, description="Sample from the k likeliest tokens.")
    top_p: float | None = Field(default=None, description="Sample from the smallest set of this probability.")
    min_p: float | None = Field(default=None, description="Leave out tokens less likely than this share.")
    repetition_penalty: float | None = Field(
        default=None, description="Above 1 makes repetition less likely."
    )
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    stop: list[str] = Field(default_factory=list, description="The answer ends before any of these texts.")

    def __init__(self, **fields: Any) -> None:
        """Load the model, so that what is wrong with it shows at once.

        Raises:
            ConfigError: an impossible setting, or no such model.
            UnsupportedModel: a model that cannot be re-positioned exactly.
        """
        super().__init__(**fields)
        self._sampling({})
        if isinstance(self.policy, str) and self.policy:
            preset(self.policy)
        self.running.model.fingerprint()  # reads all weights once: better now than in an event loop
        serve(self.running, self.document_prefix)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's listings."""
        return "KVCacheLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex sizes its prompts by."""
        return LLMMetadata(
            context_window=self.context_window or self.running.model.max_length,
            num_output=self.max_tokens,
            is_chat_model=self._is_chat,
            is_function_calling_model=False,
            model_name=self.model,
        )

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text; `Settings.tokenizer = llm.tokenize` lets LlamaIndex count with them."""
        return list(self.running.model.text.tokenize(text))

    @property
    def _is_chat(self) -> bool:
        return self.running.model.text.has_template if self.is_chat_model is None else self.is_chat_model

    # ---- messages

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        asked = self._ask(*self._written(messages), kwargs)
        with asked.stream as stream:
            for _ in stream:
                pass
            return self._chat_response(asked.finish())

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The same without blocking the event loop."""
        asked = self._ask(*self._written(messages), kwargs)
        with asked.stream as stream:
            async for _ in stream:
                pass
            return self._chat_response(asked.finish())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The same, piece by piece; the last piece has no text, but the counts."""
        asked = self._ask(*self._written(messages), kwargs)

        def pieces() -> ChatResponseGen:
            for text, piece in _grown(asked):
                yield ChatResponse(message=_said(text), delta=piece)
            yield self._chat_response(asked.finish(), delta="")

        return pieces()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """The same without blocking the event loop."""
        asked = self._ask(*self._written(messages), kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            async for text, piece in _agrown(asked):
                yield ChatResponse(message=_said(text), delta=piece)
            yield self._chat_response(asked.finish(), delta="")

        return pieces()

    # ---- text

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a text; of a chat model the user's message, unless it is `formatted` already."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)
        with asked.stream as stream:
            for _ in stream:
                pass
            return self._completion(asked.finish())

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The same without blocking the event loop."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)
        with asked.stream as stream:
            async for _ in stream:
                pass
            return self._completion(asked.finish())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The same, piece by piece; the last piece has no text, but the counts."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)

        def pieces() -> CompletionResponseGen:
            for text, piece in _grown(asked):
                yield CompletionResponse(text=text, delta=piece)
            yield self._completion(asked.finish(), delta="")

        return pieces()

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """The same without blocking the event loop."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            async for text, piece in _agrown(asked):
                yield CompletionResponse(text=text, delta=piece)
            yield self._completion(asked.finish(), delta="")

        return pieces()

    # ---- prompts and settings

    def _written(self, messages: Sequence[ChatMessage]) -> tuple[str, bool]:
        """The prompt of a conversation, and whether a chat template wrote it."""
        if self.messages_to_prompt not in {None, generic_prompt} or not self._is_chat:
            assert self.messages_to_prompt is not None
            return self.messages_to_prompt(messages), False
        return self.running.model.text.render(template_messages(messages)), True

    def _completing(self, prompt: str, formatted: bool) -> tuple[str, bool]:
        """The prompt of a text."""
        if formatted:
            return prompt, False
        assert self.completion_to_prompt is not None
        written = self.completion_to_prompt(prompt)
        if written != prompt or not self._is_chat:
            return written, False
        return self._written([ChatMessage(role=MessageRole.USER, content=prompt)])

    def _ask(self, prompt: str, is_rendered: bool, options: Mapping[str, Any]) -> _Asked:
        """Start an answer.

        Raises:
            ConfigError: an option that is not known, or a value without meaning.
        """
        policy = options.get("policy") or self.policy
        chunks = known_of(self.running).chunks_in(prompt) if self.caches else {}
        stream = self.running.stream_rendered(
            prompt,
            chunks,
            prefix=self.document_prefix if chunks else "",  # a prompt is not cut for nothing
            sampling=self._sampling(options),
            policy=preset(policy) if policy and isinstance(policy, str) else policy or None,
            is_rendered=is_rendered,
        )
        return _Asked(stream, RETRIEVED.get(), self.model)

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        if unknown := sorted(set(options) - _OPTIONS):
            raise ConfigError(
                f"this model knows no option {unknown[0]!r}; it takes {', '.join(sorted(_OPTIONS))}"
            )
        chosen = {name: options.get(name, getattr(self, name)) for name in _SAMPLING}
        stop = options.get("stop", self.stop) or ()
        return Sampling(
            max_new_tokens=options.get("max_tokens") or self.max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            **{**chosen, "temperature": chosen["temperature"] or 0.0},
        )

    # ---- responses

    def _chat_response(self, answer: Answer, delta: str | None = None) -> ChatResponse:
        return ChatResponse(
            message=_said(answer.text),
            delta=delta,
            raw=raw_of(answer, self.model),
            additional_kwargs=dict(counts_of(answer)),
        )

    def _completion(self, answer: Answer, delta: str | None = None) -> CompletionResponse:
        return CompletionResponse(
            text=answer.text,
            delta=delta,
            raw=raw_of(answer, self.model),
            additional_kwargs=dict(counts_of(answer)),
        )


def _said(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _grown(asked: _Asked) -> Iterator[tuple[str, str]]:
    """The text so far and its last piece; leaving the loop stops the answer."""
    text = ""
    with asked.stream as stream:
        for piece in stream:
            text += piece
            yield text, piece


async def _agrown(asked: _Asked) -> AsyncIterator[tuple[str, str]]:
    """The same without blocking the event loop."""
    text = ""
    with asked.stream as stream:
        async for piece in stream:
            text += piece
            yield text, piece

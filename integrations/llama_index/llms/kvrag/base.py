"""The model: LlamaIndex's prompts and messages in, an answer from prebuilt caches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
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
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection

from kvrag import Answer, ConfigError, InputError, Policy, Sampling, Session
from kvrag.calling import CallWatch
from kvrag.focus.policy import preset
from kvrag.sessions.asking import History
from llama_index.llms.kvrag._asked import Asked
from llama_index.llms.kvrag._engine import EngineFields
from llama_index.llms.kvrag._hints import RETRIEVED, serve
from llama_index.llms.kvrag._messages import template_messages
from llama_index.llms.kvrag._results import counts_of, logprobs_of, raw_of
from llama_index.llms.kvrag._sessions import InSessions
from llama_index.llms.kvrag._tools import OPTIONS as FORMS
from llama_index.llms.kvrag._tools import Form, blocks_of, can_keep_to_forms, form_of, in_openai_form

# pydantic would look into the policies' dataclasses, and need not: they check themselves.
if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

    _PolicyOrName = Policy | str
else:
    _PolicyOrName = Any

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_MUST_CALL = "must_call"
_OPTIONS = frozenset({*_SAMPLING, *FORMS, "logprobs", "max_tokens", "policy", "session", "stop"})


class KVCacheLLM(EngineFields, InSessions, FunctionCallingLLM):
    """A local model that reads retrieved nodes from prebuilt KV caches.

    Nodes that a retriever returned, that `KVCacheTransform` built caches for, or that were read before are
    found in the prompt by their text, wherever a synthesizer has put them. Nothing else changes.

    >>> from llama_index.llms.kvrag import KVCacheLLM  # doctest: +SKIP
    >>> llm = KVCacheLLM(model="Qwen/Qwen2.5-7B-Instruct", store="caches")  # doctest: +SKIP
    >>> index.as_query_engine(llm=llm).query("Why is the sky blue?")  # doctest: +SKIP

    What came from caches stands in a response's `raw["usage"]["prompt_tokens_details"]["cached_tokens"]`, and
    in `raw["kvrag"]` with each document's share of the attention.

    With a session, a conversation keeps a memory that does not grow, and only what is new in it is read:

    >>> llm = KVCacheLLM(sessions="chats", memory="cascade", memory_budget=4096)  # doctest: +SKIP
    >>> SimpleChatEngine.from_defaults(llm=llm.in_session("jane")).chat("Hello!")  # doctest: +SKIP

    Only conversations (`chat` and its like) are turns of a session; single prompts (`complete`) are not.
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
    logprobs: int | None = Field(
        default=None, description="Tell log-probabilities, and so many likeliest tokens; None: nothing."
    )
    calls_functions: bool | None = Field(
        default=None,
        description="Whether agents may give it tools; None: with a chat template and llguidance installed.",
    )
    max_string: int | None = Field(
        default=None, description="Longest text in a tool's arguments in characters; None: no end."
    )

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
        serve(self.running, self.form)
        self._start_chats()

    def in_session(self, session: Session | str | None) -> KVCacheLLM:
        """The same model for one conversation, to be handed to a chat engine or an agent.

        Args:
            session: a kvrag.Session, or its id; None: without any.

        Raises:
            ConfigError: it is neither, or belongs to another engine.
        """
        other: KVCacheLLM = self.model_copy(update={"session": session})
        other._start_chats()
        return other

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
            is_function_calling_model=self._calls_functions,
            model_name=self.model,
        )

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text; `Settings.tokenizer = llm.tokenize` lets LlamaIndex count with them."""
        return list(self.running.model.text.tokenize(text))

    @property
    def _is_chat(self) -> bool:
        return self.running.model.text.has_template if self.is_chat_model is None else self.is_chat_model

    @property
    def _calls_functions(self) -> bool:
        if self.calls_functions is not None:
            return self.calls_functions
        return self._is_chat and self.running.model.text.has_template and can_keep_to_forms()

    # ---- messages

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        asked = self._converse(messages, kwargs)
        for _ in asked.pieces():
            pass
        return self._chat_response(asked)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The same without blocking the event loop."""
        asked = self._converse(messages, kwargs)
        async for _ in asked.apieces():
            pass
        return self._chat_response(asked)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The same, piece by piece; the last piece has no text, but the counts."""
        asked = self._converse(messages, kwargs)

        def pieces() -> ChatResponseGen:
            for text, piece in asked.grown():
                yield ChatResponse(message=_said(text), delta=piece)
            yield self._chat_response(asked, delta="")

        return pieces()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """The same without blocking the event loop."""
        asked = self._converse(messages, kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            async with aclosing(asked.agrown()) as grown:
                async for text, piece in grown:
                    yield ChatResponse(message=_said(text), delta=piece)
            yield self._chat_response(asked, delta="")

        return pieces()

    # ---- text

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a text; of a chat model the user's message, unless it is `formatted` already."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)
        for _ in asked.pieces():
            pass
        return self._completion(asked.finish())

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The same without blocking the event loop."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)
        async for _ in asked.apieces():
            pass
        return self._completion(asked.finish())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The same, piece by piece; the last piece has no text, but the counts."""
        asked = self._ask(*self._completing(prompt, formatted), kwargs)

        def pieces() -> CompletionResponseGen:
            for text, piece in asked.grown():
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
            async with aclosing(asked.agrown()) as grown:
                async for text, piece in grown:
                    yield CompletionResponse(text=text, delta=piece)
            yield self._completion(asked.finish(), delta="")

        return pieces()

    # ---- tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        tool_required = kwargs.pop(_MUST_CALL, False) or tool_required
        choice = kwargs.pop("tool_choice", None) or ("required" if tool_required else "auto")
        return {
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls that a response consists of.

        Raises:
            InputError: there are none, and there should be.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if error_on_no_tool_call and not calls:
            raise InputError(
                f"the model called no tool; it said {response.message.content!r} "
                f"({(response.raw or {}).get('finish_reason')}): give it more max_tokens, or require a call"
            )
        return [
            ToolSelection(
                tool_id=call.tool_call_id or "",
                tool_name=call.tool_name,
                tool_kwargs=call.tool_kwargs if isinstance(call.tool_kwargs, dict) else {},
            )
            for call in calls
        ]

    # LlamaIndex's programs do not say that a call is required when they stream.

    def stream_structured_predict(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        """An object of a class, as far as it is known; see `LLM.stream_structured_predict`."""
        return super().stream_structured_predict(
            output_cls, prompt, self._must_call(llm_kwargs), **prompt_args
        )

    async def astream_structured_predict(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        """The same without blocking the event loop."""
        told = self._must_call(llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, told, **prompt_args)

    def _must_call(self, options: dict[str, Any] | None) -> dict[str, Any]:
        return {**(options or {}), **({_MUST_CALL: True} if self._calls_functions else {})}

    # ---- prompts and settings

    def _converse(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> Asked:
        """Start an answer to a conversation."""
        session = self._session_of(options)
        if session is None:
            return self._ask(*self._written(messages, options.get("tools")), options)
        form = form_of(options, self.max_string)
        history: History = template_messages(messages)
        if not self._writes_messages:
            history, _ = self._written(messages, form.tools)
        stream = session.stream_reply(
            history, tools=form.tools or None, sampling=self._sampling(options, form)
        )
        return Asked(stream, RETRIEVED.get(), self.model, form, session)

    @property
    def _writes_messages(self) -> bool:
        """Whether the chat template does."""
        return self.messages_to_prompt in {None, generic_prompt} and self._is_chat

    def _written(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str, bool]:
        """The prompt of a conversation, and whether a chat template wrote it."""
        if not self._writes_messages:
            assert self.messages_to_prompt is not None
            if tools:
                raise ConfigError("this model has no chat template to write tools with; use a ReActAgent")
            return self.messages_to_prompt(messages), False
        return self.running.render(template_messages(messages), tools), True

    def _completing(self, prompt: str, formatted: bool) -> tuple[str, bool]:
        """The prompt of a text."""
        if formatted:
            return prompt, False
        assert self.completion_to_prompt is not None
        written = self.completion_to_prompt(prompt)
        if written != prompt or not self._is_chat:
            return written, False
        return self._written([ChatMessage(role=MessageRole.USER, content=prompt)])

    def _ask(self, prompt: str, is_rendered: bool, options: Mapping[str, Any]) -> Asked:
        """Start an answer.

        Raises:
            ConfigError: an option that is not known, or a value without meaning.
        """
        policy = options.get("policy") or self.policy
        form = form_of(options, self.max_string)
        stream = self.running.stream_rendered(
            prompt,
            None if self.caches else (),
            prefix=self.document_prefix if self.caches else "",
            sampling=self._sampling(options, form),
            policy=preset(policy) if policy and isinstance(policy, str) else policy or None,
            is_rendered=is_rendered,
        )
        return Asked(stream, RETRIEVED.get(), self.model, form)

    def _sampling(self, options: Mapping[str, Any], form: Form | None = None) -> Sampling:
        if unknown := sorted(set(options) - _OPTIONS):
            raise ConfigError(
                f"this model knows no option {unknown[0]!r}; it takes {', '.join(sorted(_OPTIONS))}"
            )
        chosen = {name: options.get(name, getattr(self, name)) for name in _SAMPLING}
        stop = options.get("stop", self.stop) or ()
        return Sampling(
            max_new_tokens=options.get("max_tokens") or self.max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=options.get("logprobs", self.logprobs),
            constraint=form.constraint if form else None,
            **{**chosen, "temperature": chosen["temperature"] or 0.0},
        )

    # ---- responses

    def _chat_response(self, asked: Asked, delta: str | None = None) -> ChatResponse:
        answer = asked.finish()
        watch = CallWatch(asked.form.tools)
        text = watch.push(answer.text)
        rest, calls = watch.finish()
        text += rest
        message = _said(text)
        if calls:
            found = blocks_of(calls if asked.form.several else calls[:1])
            message.blocks = [*([TextBlock(text=text)] if text else []), *found]
            message.additional_kwargs["tool_calls"] = in_openai_form(found)  # programs that stream look here
        return ChatResponse(
            message=message,
            delta=delta,
            raw=raw_of(answer, self.model, asked.session.name if asked.session else None),
            logprobs=logprobs_of(answer.logprobs),
            additional_kwargs=dict(counts_of(answer)),
        )

    def _completion(self, answer: Answer, delta: str | None = None) -> CompletionResponse:
        return CompletionResponse(
            text=answer.text,
            delta=delta,
            raw=raw_of(answer, self.model),
            logprobs=logprobs_of(answer.logprobs),
            additional_kwargs=dict(counts_of(answer)),
        )


def _said(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)

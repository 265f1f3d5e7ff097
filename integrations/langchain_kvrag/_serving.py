"""What the chat model and the text model share: the engine, its settings, a prompt's way through it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID

from langchain_core.documents import Document
from langchain_core.exceptions import ContextOverflowError
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from kvrag import (
    Answer,
    AnswerStream,
    ConfigError,
    ContextOverflow,
    Engine,
    GenerationCancelled,
    Policy,
    Sampling,
    Session,
)
from kvrag.answer import report
from kvrag.constrain import Constraint
from kvrag.explain import why_not
from kvrag.focus.policy import PLAIN, preset
from kvrag.ingested import key_of
from kvrag.messages import Tool
from kvrag.model import READER
from kvrag.prompt import RagPrompt
from kvrag.sessions.asking import History
from kvrag.shared import EngineSettings, SharedEngine, shared_engine
from kvrag.store.key import tagged_digest
from kvrag.tiers import Tier
from langchain_kvrag._hints import WATCH, serve, write_back
from langchain_kvrag._sessions import InSessions

logger = logging.getLogger("langchain_kvrag")

# pydantic would look into the policies' dataclasses, and need not: they check themselves.
if TYPE_CHECKING:
    _PolicyOrName = Policy | str
    _Engine = Engine
else:
    _PolicyOrName = _Engine = Any

TEMPLATE = "template"
_LOGPROBS = ("logprobs", "top_logprobs")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class ContextOverflowed(ContextOverflow, ContextOverflowError):
    """The prompt exceeds the model's window; an error of kvrag and of LangChain."""


class AnswerTimeout(GenerationCancelled, TimeoutError):
    """The answer took longer than `timeout` seconds and was stopped."""


@dataclass(frozen=True)
class Call:
    """One call's settings: the model's own, and what the call says otherwise."""

    sampling: Sampling
    policy: Policy | None
    timeout: float | None


class Serving(InSessions):
    """Fields and inner life of both models; not used by itself."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    model: str = Field(default=READER, alias="model_name")
    """Folder or hub name of a decoder; "kvrag/reader" is the small one that comes along."""
    store: Any = None
    """Where caches are kept: a folder or a `KVStore`; None keeps nothing."""
    engine: _Engine | None = Field(default=None, exclude=True, repr=False)
    """An engine that is already there, instead of `model`, `store` and the six settings below."""
    device: str | None = None
    """Where the model computes; None: the GPU if there is one."""
    dtype: str = "auto"
    """Of the weights."""
    max_length: int | None = None
    """Longest prompt plus answer in tokens; None: the model's own limit."""
    codec: str = "raw"
    """How caches are written: "raw", "fp8", "int8" or "int4"."""
    match: tuple[Tier, ...] = ()
    """What counts as finding a document in a prompt, beside its exact words: "canonical" (escaped, quoted,
    other white space), "partial" (beginnings), "middle" (any piece), "markers". See `kvrag.KnownTexts`."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `kvrag.Engine.from_pretrained`, such as `revision` or `max_batch`."""

    policy: _PolicyOrName = PLAIN
    """What is done with a prompt's documents: a policy of `kvrag.focus`, or a preset's name."""
    prefix: str = TEMPLATE
    """What documents are encoded behind: "template" (what the model's chat template writes before the first
    message's text), or a text, best the beginning that all prompts share."""
    caches: bool = True
    """Use caches; with False every prompt is read as a whole, for comparisons."""

    temperature: float = 0.0
    """0 is greedy."""
    max_tokens: int = 256
    """Longest answer in tokens."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float | None = None
    """Sample from the smallest set that holds this probability."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens of prompt and answer less likely."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    """The answer ends before any of these texts."""
    logprobs: bool = False
    """Say how likely each token was, in OpenAI's form."""
    top_logprobs: int | None = None
    """Say so of this many of the likeliest tokens at each place, too."""
    max_json_chars: int | None = None
    """Longest string in answers that are kept to a form, for small models that do not find a string's end."""
    timeout: float | None = None
    """Seconds after which an answer is stopped with `AnswerTimeout`."""
    streaming: bool = False
    """Stream also where `invoke` was called, for handlers that want each token."""
    max_retries: int = 0
    """Taken for the sake of code that sets it for every model; nothing here fails and works the next time."""
    api_key: SecretStr | None = Field(default=None, exclude=True)
    """Taken for the same reason; there is nobody to show it to."""

    _is_rendered: ClassVar[bool] = True  # prompts come out of a chat template, which writes any BOS
    _share: SharedEngine | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _start_serving(self) -> Self:
        """Have the engine ready, so that what is wrong with it shows at once."""
        if self.engine is not None and not isinstance(self.engine, Engine):
            raise ConfigError(f"engine is a {type(self.engine).__name__}; expected a kvrag.Engine")
        if self.engine is not None and "model" not in self.model_fields_set:
            self.model = self.engine.model.name
        if not isinstance(self.policy, Policy):
            preset(self.policy)
        self._call(None, {})
        self.running.model.fingerprint()  # reads all weights once: better now than in an event loop
        serve(self.running, self.document_form)
        self._start_chats()
        return self

    @property
    def running(self) -> Engine:
        """The engine; loaded now if it is not yet."""
        if self.engine is not None:
            return self.engine
        if self._share is None:
            self._share = shared_engine(self._engine_settings())
        return self._share.engine

    def _engine_settings(self) -> EngineSettings:
        return EngineSettings(
            model=self.model,
            store=self.store,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
            codec=self.codec,
            tiers=self.match,
            options=tuple(sorted(self.model_options.items())),
        )

    def __getstate__(self) -> dict[Any, Any]:
        """Without the engine, which is loaded again where the object arrives.

        Raises:
            ConfigError: it was made with `engine`, which cannot travel.
        """
        if self.engine is not None:
            raise ConfigError("made with engine=..., this cannot be pickled; name model and store instead")
        self._check_travel()
        state = super().__getstate__()
        private = {**(state["__pydantic_private__"] or {}), "_share": None, "_chats": None}
        return {**state, "__pydantic_private__": private}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Load the engine, or share it."""
        super().__setstate__(state)
        serve(self.running, self.document_form)
        self._start_chats()

    @property
    def model_name(self) -> str:
        """The model's name, as other integrations call it."""
        return self.model

    @property
    def document_prefix(self) -> str:
        """The text that documents are encoded behind."""
        return self.running.model.text.opening if self.prefix == TEMPLATE else self.prefix

    @property
    def document_form(self) -> RagPrompt:
        """The same as an encoder takes it."""
        return RagPrompt(self.document_prefix, is_rendered=self._is_rendered)

    @property
    def default_policy(self) -> Policy:
        """What is done with documents if a call says nothing else."""
        if "policy" not in self.model_fields_set:
            return self.running.policy
        return preset(self.policy) if isinstance(self.policy, str) else self.policy

    @property
    def _cache_mode(self) -> str:
        store = self.running.store
        if not self.caches:
            return "off"
        return "none" if store is None else f"{type(store).__name__} {self.running.codec}"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What answers depend on; also the key under which LangChain's own caches keep them."""
        model = self.running.model
        return {
            "model": self.model,
            "fingerprint": tagged_digest({**model.fingerprint().fields()}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "policy": repr(self.default_policy),
            "caches": self._cache_mode,
            "prefix": self.document_prefix,
            "max_length": model.max_length,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "max_json_chars": self.max_json_chars,
            **{name: getattr(self, name) for name in _LOGPROBS},
            **{name: getattr(self, name) for name in _SAMPLING},
        }

    def get_token_ids(self, text: str) -> list[int]:
        """Tokens of a text, by the model's own tokenizer."""
        return list(self.running.model.text.tokenize(text))

    def _call(
        self,
        stop: Sequence[str] | None,
        options: Mapping[str, Any],
        constraint: Constraint | None = None,
    ) -> Call:
        """Settings of one call.

        Raises:
            ConfigError: an option that is not known, or a value without meaning.
        """
        known = {*_SAMPLING, *_LOGPROBS, "max_tokens", "policy", "timeout", "model", "stream"}
        if unknown := sorted(set(options) - known):
            raise ConfigError(
                f"this model knows no option {unknown[0]!r}; it takes {', '.join(sorted(known))}"
            )
        if options.get("model", self.model) != self.model:
            raise ConfigError(
                f"model={options['model']!r}: this one serves {self.model!r}; make another for that"
            )
        chosen = {name: options.get(name, getattr(self, name)) for name in _SAMPLING}
        told, top = (options.get(name, getattr(self, name)) for name in _LOGPROBS)
        stops = tuple(self.stop or ()) if stop is None else tuple(stop)
        sampling = Sampling(
            max_new_tokens=options.get("max_tokens") or self.max_tokens,
            stop=stops,
            logprobs=(top or 0) if told or top else None,
            constraint=constraint,
            **{**chosen, "temperature": chosen["temperature"] or 0.0},
        )
        policy = options.get("policy", self.default_policy if "policy" in self.model_fields_set else None)
        return Call(
            sampling,
            preset(policy) if isinstance(policy, str) else policy,
            options.get("timeout", self.timeout),
        )

    @contextmanager
    def _ask(self, prompt: str, call: Call) -> Iterator[AnswerStream]:
        """An answer under way to a prompt of which nothing but documents was read before."""
        stream = self.running.stream_rendered(
            prompt,
            None if self.caches else (),
            prefix=self.document_prefix if self.caches else "",
            sampling=call.sampling,
            policy=call.policy,
            is_rendered=self._is_rendered,
        )
        with self._under_way(stream, call):
            yield stream

    @contextmanager
    def _reply(
        self, session: Session, history: History, call: Call, tools: Sequence[Tool] = ()
    ) -> Iterator[AnswerStream]:
        """The next turn of a session under way."""
        stream = session.stream_reply(history, tools=tools or None, sampling=call.sampling)
        with self._under_way(stream, call):
            yield stream

    @contextmanager
    def _under_way(self, started: AnswerStream, call: Call) -> Iterator[None]:
        """An answer is cancelled on exit, and errors come out as both sides know them.

        Raises:
            ContextOverflowed: the prompt leaves no room for an answer.
            AnswerTimeout: it took too long.
        """
        with started as stream:
            timer = None if call.timeout is None else threading.Timer(call.timeout, stream.cancel)
            if timer is not None:
                timer.daemon = True
                timer.start()
            try:
                yield
            except ContextOverflow as error:
                raise ContextOverflowed(str(error)) from error
            except GenerationCancelled as error:
                if timer is not None and timer.finished.is_set():
                    raise AnswerTimeout(f"no answer within {call.timeout} seconds; it was stopped") from error
                raise
            finally:
                if timer is not None:
                    timer.cancel()

    def _tell(self, answer: Answer, run_id: UUID | None, more: Sequence[Document] = ()) -> dict[str, Any]:
        """What is reported of an answer; retrieved documents that carry our field are told as well."""
        told = report(answer)
        write_back(WATCH.retrieved(run_id), told["documents"])
        self._explain(answer, run_id, more)
        return told

    def _explain(self, answer: Answer, run_id: UUID | None, more: Sequence[Document] = ()) -> None:
        """One line about retrieved documents that are not among the answer's cached ones."""
        if not (self.caches and logger.isEnabledFor(logging.DEBUG)):
            return
        found = {use.key for use in answer.documents}
        texts = dict.fromkeys(d.page_content for d in [*WATCH.retrieved(run_id), *more])
        missed = [text for text in texts if key_of(text) not in found]
        if missed:
            reasons = (f"{text[:32]!r}: {why_not(answer.plan, text, min_chars=16)}" for text in missed)
            logger.debug(
                "%d retrieved documents were not used from caches: %s", len(missed), "; ".join(reasons)
            )


def finished(stream: AnswerStream) -> Answer:
    """A stream's answer, once its text is complete.

    Raises:
        GenerationCancelled: it was stopped.
    """
    if stream.answer is None:
        raise GenerationCancelled("the answer was cancelled")
    return stream.answer


def package_version() -> str:
    """Of the distribution."""
    return version("kvrag")


def document_form(engine: Serving | Engine, prefix: str | None) -> RagPrompt:
    """Of the prompts that documents are encoded for."""
    if isinstance(engine, Serving):
        own = engine.document_form
    else:
        text = engine.model.text
        own = RagPrompt(text.opening, is_rendered=text.has_template)
    return own if prefix in {None, TEMPLATE} else RagPrompt(prefix or "", is_rendered=own.is_rendered)

"""The engine: what people and adapters hold. It owns a model, a store and the thread that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from kvrag.answer import Answer
from kvrag.caches import Caches
from kvrag.config import Sampling
from kvrag.costs import CostTable
from kvrag.encoder import DocumentEncoder
from kvrag.errors import ConfigError, GenerationCancelled, InputError
from kvrag.focus.policy import PLAIN, Policy, preset
from kvrag.hosting import SessionHost
from kvrag.known import KnownTexts
from kvrag.matching import ChunkMatcher
from kvrag.messages import Message, Tool
from kvrag.metrics import Snapshot
from kvrag.model import READER, Model
from kvrag.passes import Passes
from kvrag.prompt import RagPrompt
from kvrag.query import Request, answer
from kvrag.segments import KV
from kvrag.speeds import disk_of
from kvrag.store.base import KVStore
from kvrag.store.found import counts_of
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.objects import ObjectStore
from kvrag.store.tenants import Tenant
from kvrag.stores import Ahead, open_store
from kvrag.streams import AnswerStream
from kvrag.text import joined_tokens
from kvrag.trial.choice import AUTO, MAX_KL, fitting_codec
from kvrag.worker import Worker

T = TypeVar("T")
Chunks = Sequence[str] | Mapping[str, str] | ChunkMatcher | KnownTexts


class Engine(SessionHost):
    """Answers prompts whose documents it has read before.

    One engine serves many callers: the model runs in one thread of the engine's, and answers that run at
    the same time are read together, one forward pass for the next token of each. They join and leave between
    two tokens; a long prompt is read piece by piece in between.
    """

    def __init__(
        self,
        model: Model,
        store: KVStore | str | Path | None = None,
        *,
        policy: Policy | str = PLAIN,
        codec: str = "raw",
        max_kl: float | None = None,
        tenant: Tenant | None = None,
        token_budget: int = 2048,
        recompute: str = "auto",
        costs: CostTable | None = None,
        memory_bytes: int | None = None,
        objects: str | ObjectStore | None = None,
        budget_bytes: int | None = None,
        max_batch: int = 16,
        pass_tokens: int | None = None,
        known: KnownTexts | None = None,
    ) -> None:
        """Serve a loaded model.

        Args:
            model: the decoder.
            store: a store, a folder for one (encrypted if KVRAG_STORE_KEY is set), or None for none.
            policy: what answers do with their documents, or its name; an answer may have one of its own.
            codec: how rows are written to a store: "raw", "fp8", "int8" or "int4" (docs/store-format.md); or
                "auto": the smallest that loses at most `max_kl`, measured on sample prompts the first time
                that the store sees this model, and remembered there.
            max_kl: what "auto" allows, in nats of the next tokens' distributions; None: 0.01.
            tenant: whose texts these are: nobody else can find their entries; None: a name space for all.
            token_budget: most tokens per forward pass while encoding documents, padding included.
            recompute: read documents anew that the store has: "auto" where that is faster, "never", "always".
            costs: what loading and reading take; None: measured when it matters, and kept beside the store.
            memory_bytes: of a tier in memory in front of the store: on the model's device, which is what pays
                on a GPU; on a CPU it holds what comes from `objects` where there is no folder.
            objects: a bucket behind the store: its URL, such as "s3://bucket/prefix", or an `ObjectStore`
                where it needs options.
            budget_bytes: what the entries of a store that is given as a folder may take.
            max_batch: most answers under way; more wait until one of these is complete, first come, first
                served. Bounds the memory that answers take.
            pass_tokens: most tokens of prompts that are read in one pass with other answers' tokens, which
                wait for it that long; None: 128 on a CPU, 1024 elsewhere. A prompt whose documents are pruned
                while its question is read, or looked at closely, is read in passes of 2048.
            known: texts that are looked for in prompts of which no chunks are named; None: a new registry.

        Raises:
            ConfigError: no policy, or no codec, has this name, a number below one, or tiers that cannot be; a
                budget without "auto", or a model on which nothing can be measured.
        """
        if max_kl is not None and codec != AUTO:
            raise ConfigError(f"max_kl={max_kl} chooses a codec, and codec={codec!r} names one; give 'auto'")
        usual = 128 if model.device.type == "cpu" else 1024
        pass_tokens = usual if pass_tokens is None else pass_tokens
        if max_batch < 1 or pass_tokens < 1:
            raise ConfigError(f"max_batch is {max_batch} and pass_tokens {pass_tokens}; expected at least 1")
        self.policy = preset(policy) if isinstance(policy, str) else policy
        opened = open_store(
            store,
            memory_bytes=memory_bytes,
            objects=objects,
            budget_bytes=budget_bytes,
            device=model.device,
        )
        caches = Caches(
            model,
            opened,
            codec="raw" if codec == AUTO else codec,
            tenant=tenant,
            token_budget=token_budget,
            recompute=recompute,
            costs=costs,
        )
        self.codec = codec
        self.tenant = tenant
        passes = Passes(model, pass_tokens)
        worker = Worker(f"kvrag {model.name}", server=passes, max_running=max_batch)
        texts = KnownTexts() if known is None else known
        super().__init__(model, opened, caches, worker, known=texts, pass_tokens=pass_tokens)
        if codec == AUTO:
            self._fit_codec(MAX_KL if max_kl is None else max_kl)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = READER,
        *,
        store: KVStore | str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
        policy: Policy | str = PLAIN,
        codec: str = "raw",
        max_kl: float | None = None,
        tenant: Tenant | None = None,
        token_budget: int = 2048,
        recompute: str = "auto",
        costs: CostTable | None = None,
        memory_bytes: int | None = None,
        objects: str | ObjectStore | None = None,
        budget_bytes: int | None = None,
        max_batch: int = 16,
        pass_tokens: int | None = None,
        known: KnownTexts | None = None,
        **options: Any,
    ) -> Engine:
        """Load a transformers decoder and its tokenizer; see `Model.load` and the class for arguments.

        Raises:
            ConfigError: no such model here, damaged files, or an impossible device, dtype or length.
            UnsupportedModel: unknown architecture, or one that cannot be re-positioned exactly.
        """
        loaded = Model.load(model, device=device, dtype=dtype, max_length=max_length, **options)
        return cls(
            loaded,
            store,
            policy=policy,
            codec=codec,
            max_kl=max_kl,
            tenant=tenant,
            token_budget=token_budget,
            recompute=recompute,
            costs=costs,
            memory_bytes=memory_bytes,
            objects=objects,
            budget_bytes=budget_bytes,
            max_batch=max_batch,
            pass_tokens=pass_tokens,
            known=known,
        )

    def answer(
        self,
        prompt: str | Sequence[Message],
        chunks: Chunks | None = None,
        *,
        prefix: str | None = None,
        sampling: Sampling | None = None,
        policy: Policy | None = None,
    ) -> Answer:
        """Answer a prompt; chunks that stand in it verbatim are not read again.

        Args:
            prompt: text, or chat messages for the model's template.
            chunks: texts that may stand in the prompt; None: those that the engine's registry `known` holds.
            prefix: the text that the chunks are encoded behind; best the prompt's own beginning. None: the
                registry's for its texts, and none for others.
            sampling: how the answer is chosen; greedy by default.
            policy: what is done with the documents; None: the engine's.

        Raises:
            InputError: the prompt is empty or the template refuses it.
            ContextOverflow: the prompt leaves no room for an answer.
        """
        stream = self.stream(prompt, chunks, prefix=prefix, sampling=sampling, policy=policy)
        for _ in stream:
            pass
        if stream.answer is None:
            raise GenerationCancelled("the answer was cancelled")
        return stream.answer

    def stream(
        self,
        prompt: str | Sequence[Message],
        chunks: Chunks | None = None,
        *,
        prefix: str | None = None,
        sampling: Sampling | None = None,
        policy: Policy | None = None,
    ) -> AnswerStream:
        """The same as `answer`, piece by piece."""
        is_rendered = not isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self.model.text.render(prompt)
        return self.stream_rendered(
            text, chunks, prefix=prefix, sampling=sampling, policy=policy, is_rendered=is_rendered
        )

    def stream_rendered(
        self,
        prompt: str,
        chunks: Chunks | None = None,
        *,
        prefix: str | None = None,
        sampling: Sampling | None = None,
        policy: Policy | None = None,
        contexts: Mapping[str, Sequence[str]] | None = None,
        sources: Mapping[str, str] | None = None,
        is_rendered: bool = True,
        ahead: Ahead | None = None,
    ) -> AnswerStream:
        """Answer a prompt that a chat template has already written (no BOS is added to it).

        `contexts` gives for chunks by name the pieces of text that they are encoded behind, beside the prefix
        (see `RagPrompt.before`); chunks that it does not name are encoded behind the prefix alone. `sources`
        gives for chunks by name what they are chunks of, for a policy that keeps chunks of one source
        together; a chunk without is a source of its own. `ahead` is what `prefetch` gave for this answer: it
        ends with it.
        """
        if isinstance(chunks, str):
            raise InputError("chunks is one text; expected a list of texts, or texts by name")
        if chunks is None:
            chunks = self.known
        known = (
            chunks
            if isinstance(chunks, (Mapping, ChunkMatcher, KnownTexts))
            else {str(i): c for i, c in enumerate(chunks)}
        )
        if prefix is None:
            prefix = known.prefix if isinstance(known, KnownTexts) else ""
        request = Request(
            prompt,
            known,
            prefix,
            is_rendered,
            sampling or Sampling(),
            policy or self.policy,
            contexts or {},
            sources or {},
            ahead,
        )
        work = partial(answer, self._caches, request, stride=self.pass_tokens)
        return AnswerStream(self._worker.submit(work, in_line=True))

    def batch(self, requests: Sequence[Mapping[str, Any]]) -> list[AnswerStream]:
        """Answer several prompts together: for each, what `stream` gives.

        Args:
            requests: for each, arguments of `stream` by name: `prompt`, and others where they are wanted.

        Raises:
            InputError: one of them cannot be used as given; none is answered then.
        """
        streams: list[AnswerStream] = []
        try:
            for request in requests:
                streams.append(self.stream(**request))
        except Exception:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        documents: Sequence[str | Mapping[str, str]] | None = None,
    ) -> str:
        """A conversation as the model's template writes it, up to where the answer begins; see `Text.render`.

        Raises:
            InputError: the model has no chat template, or it refuses these messages.
        """
        return self.model.text.render(messages, tools, documents)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as it would stand in a prompt, without anything in front of it."""
        return len(self.model.text.tokenize(text))

    def prefetch(
        self,
        texts: Sequence[str | EntryKey] | Mapping[str, str],
        *,
        prefix: str = "",
        contexts: Mapping[str, Sequence[str]] | None = None,
        policy: Policy | None = None,
        is_rendered: bool = True,
    ) -> Ahead:
        """Begin to load documents that an answer will need, as soon as a retriever has named them.

        Documents that are in memory, or would be read anew because that is faster, are left alone. For a
        policy that prunes, the layers that all documents are read in come; others come when they are needed.

        Args:
            texts: of the chunks, by name if there are `contexts`; or keys of entries.
            prefix: see `answer`.
            contexts: see `stream_rendered`.
            policy: that the answer will have; None: the engine's.
            is_rendered: the prompt will come out of a chat template.

        Returns:
            What ends it: give it to `stream_rendered`, or close it when the answer is there. Letting go of it
            ends it, too.
        """
        named = texts if isinstance(texts, Mapping) else dict(enumerate(texts))
        pruning = (policy or self.policy).pruning
        num_layers = None if pruning is None else pruning.first(self.model.num_layers)
        keys = [text for text in named.values() if isinstance(text, EntryKey)]
        tokenize, before = self.model.text.tokenize, contexts or {}
        pairs = [
            (tokenize(text.strip()), joined_tokens(self.model.text, before.get(str(name), ())))
            for name, text in named.items()
            if isinstance(text, str) and text.strip() and self.store is not None
        ]
        behind = tokenize(prefix, first=not is_rendered)
        return Ahead(
            self._caches.prefetch(behind, [t for t, _ in pairs], [c for _, c in pairs], num_layers),
            self._caches.prefetch_entries(keys, num_layers),
        )

    def _fit_codec(self, max_kl: float) -> None:
        """Write by the smallest codec within a budget; without one, there is no engine."""
        disk, form = disk_of(self.store), RagPrompt.of(self.model.text)
        folder = None if disk is None else disk.path
        try:
            self.use_codec(self.call(lambda: fitting_codec(self.model, form, max_kl, folder)))
        except BaseException:
            self.close()
            raise

    def use_codec(self, name: str) -> None:
        """Write rows by another codec from now on; entries by the one before are not found any more.

        `kvrag.doctor.fit_codec` chooses one by what it loses. Encoders made before keep the old one's names.

        Raises:
            ConfigError: no codec has this name.
        """
        self.call(lambda: self._caches.use_codec(name))
        self.codec = name

    def measure(self) -> CostTable:
        """Find out how fast disk, link and model are here, and keep it beside the store; see `CostTable`."""
        return self.call(self._caches.speeds.measure)

    @property
    def costs(self) -> CostTable:
        """What is known of speeds now."""
        return self._caches.speeds.table

    def metrics(self) -> Snapshot:
        """What has been counted since the engine was made; see `kvrag.metrics` for Prometheus."""
        return self._caches.metrics.snapshot(counts_of(self._caches.reads))

    def fingerprint(self) -> Fingerprint:
        """What entries depend on that stand behind nothing: model, codec, tenant."""
        return self._caches.fingerprint_behind(())

    def encoder(self, prompt: RagPrompt | None = None) -> DocumentEncoder:
        """What a corpus needs to build caches for prompts of one form."""
        form = prompt or RagPrompt.of(self.model.text)
        return DocumentEncoder(self._caches, self._worker, form)

    def encode(self, texts: Sequence[str], *, prefix: str = "") -> list[KV]:
        """Read texts, each on its own behind a prefix, without keeping them in the store.

        Raises:
            EmptyDocument: a text without tokens.
            DocumentTooLong: a text that does not fit behind the prefix.
        """
        encoder = self.encoder(RagPrompt(prefix=prefix, is_rendered=False))
        return encoder.encode([encoder.tokenize(text) for text in texts])

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the thread that owns the model and wait for its result."""
        return self._worker.call(function)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._worker.is_closed

    def __copy__(self) -> Engine:
        """The engine itself: what holds an engine and is copied shares it."""
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Engine:
        """The engine itself."""
        return self

    def close(self) -> None:
        """Write the sessions that have a folder, cancel running answers, let go of the store's files.

        Raises:
            StoreWriteError: sessions cannot be written; the engine is closed all the same.
        """
        try:
            self._close_sessions()
        finally:
            self._worker.close()
            self._caches.close()

    def __enter__(self) -> Engine:
        """Close on exit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

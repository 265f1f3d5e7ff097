"""What a chain has just retrieved, told to the engine while the chain is still writing its prompt.

LangChain hands events of all runs to callback handlers. Ours notes which documents the retrievers of one
outermost run returned, makes their texts known and starts to load their caches. It decides nothing: what
is found in the prompt is found by its text, whether or not the events reached us.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.tracers.context import register_configure_hook

from kvrag import Engine
from kvrag.ingested import engines, key_of, known_of
from kvrag.prefetch import Prefetch
from kvrag.prompt import RagPrompt

_MAX_ROOTS = 1024  # of runs whose end we may never hear of
RELEVANCE = "kvrag"
"""The metadata field in which a document carries what is known of its cache and of its use."""


@dataclass
class _Root:
    """An outermost run: its members and what its retrievers returned."""

    members: list[UUID] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)


class Watch(BaseCallbackHandler):
    """Notes what retrievers return, by outermost run; may be told from any thread."""

    run_inline = True  # a dictionary's update needs no thread, and must be done before the model starts

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._roots: OrderedDict[UUID, _Root] = OrderedDict()
        self._root_of: dict[UUID, UUID] = {}
        self._lock = threading.Lock()

    def retrieved(self, run_id: UUID | None) -> list[Document]:
        """What was retrieved in the outermost run that this run belongs to."""
        with self._lock:
            root = self._roots.get(self._root_of[run_id]) if run_id in self._root_of else None
            return list(root.documents) if root else []

    def note(self, run_id: UUID | None, documents: Sequence[Document]) -> None:
        """Documents that belong to what was retrieved in this run's outermost one."""
        with self._lock:
            root = self._roots.get(self._root_of[run_id]) if run_id in self._root_of else None
            if root is not None:
                root.documents.extend(documents)

    @property
    def num_runs(self) -> int:
        """Runs under way."""
        with self._lock:
            return len(self._root_of)

    def _enter(self, run_id: UUID, parent_run_id: UUID | None) -> None:
        with self._lock:
            root_id = self._root_of.get(parent_run_id, parent_run_id) if parent_run_id else run_id
            root = self._roots.setdefault(root_id or run_id, _Root())
            self._root_of[run_id] = root_id or run_id
            root.members.append(run_id)
            while len(self._roots) > _MAX_ROOTS:
                self._drop(next(iter(self._roots)))

    def _leave(self, run_id: UUID) -> None:
        with self._lock:
            root_id = self._root_of.get(run_id)
            if root_id is None:
                return
            root = self._roots[root_id]
            if root_id == run_id or root.members == [run_id]:
                self._drop(root_id)

    def _drop(self, root_id: UUID) -> None:
        for member in self._roots.pop(root_id).members:
            self._root_of.pop(member, None)

    # ---- LangChain's events

    def on_chain_start(self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any) -> None:
        """A chain, graph or runnable."""
        self._enter(run_id, parent_run_id)

    def on_tool_start(self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any) -> None:
        """A tool."""
        self._enter(run_id, parent_run_id)

    def on_retriever_start(self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any) -> None:
        """A retriever."""
        self._enter(run_id, parent_run_id)

    def on_chat_model_start(
        self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any
    ) -> None:
        """A chat model."""
        self._enter(run_id, parent_run_id)

    def on_llm_start(self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any) -> None:
        """A text model."""
        self._enter(run_id, parent_run_id)

    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **_: Any) -> None:
        """Documents are on their way into a prompt."""
        self.note(run_id, documents)
        expect([document.page_content for document in documents])
        self._leave(run_id)

    def on_chain_end(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)

    def on_tool_end(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)

    def on_llm_end(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)

    def on_chain_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)

    def on_tool_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)

    def on_llm_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)

    def on_retriever_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        """Over."""
        self._leave(run_id)


WATCH = Watch()
_variable: ContextVar[Watch | None] = ContextVar("kvrag_watch", default=WATCH)
_attached = threading.Lock()
_forms: WeakKeyDictionary[Engine, dict[RagPrompt, None]] = WeakKeyDictionary()
_prefetches: WeakKeyDictionary[Engine, Prefetch] = WeakKeyDictionary()


def serve(engine: Engine, form: RagPrompt) -> None:
    """From now on, what any retriever returns is made known to this engine and loaded for this form."""
    if _attached.acquire(blocking=False):  # once for all
        register_configure_hook(_variable, inheritable=True)
    known_of(engine)
    _forms.setdefault(engine, {})[form] = None


def prefetch_of(engine: Engine) -> Prefetch:
    """The engine's loader."""
    return _prefetches.setdefault(engine, Prefetch(engine))


def expect(texts: Sequence[str]) -> None:
    """Texts will probably stand in a prompt soon."""
    for engine in engines():
        known_of(engine).see(texts)
        for form in list(_forms.get(engine, ()))[-1:]:  # a hint may be wrong, and one is enough
            prefetch_of(engine).hint(texts, form)


def write_back(documents: Iterable[Document], uses: Sequence[dict[str, Any]]) -> None:
    """Add to documents that carry our field what an answer made of them.

    Args:
        documents: those without the field are left alone: they may belong to somebody else.
        uses: as `kvrag.answer.report` gives them.
    """
    by_key = {use["key"]: use for use in uses}
    for document in documents:
        carried = document.metadata.get(RELEVANCE)
        use = by_key.get(key_of(document.page_content))
        if isinstance(carried, dict) and use is not None:
            carried.update({name: value for name, value in use.items() if name != "key"})

"""Read every document once: RAG answers from prebuilt KV caches.

>>> from kvrag import Engine  # doctest: +SKIP
>>> with Engine.from_pretrained("Qwen/Qwen2.5-7B-Instruct", store="caches") as engine:  # doctest: +SKIP
...     print(engine.answer("...a long document... Who wrote it?", ["...a long document..."]).text)

Names are imported when they are first used: the command line's help does not wait for torch. `Archive`,
`Corpus`, `Index`, `Recall` and `ask` are here as well; they need chromadb.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import version

    from kvrag.answer import Answer as Answer
    from kvrag.answer import DocumentUse as DocumentUse
    from kvrag.answer import MemoryUse as MemoryUse
    from kvrag.answer import Piece as Piece
    from kvrag.answer import RecalledSpan as RecalledSpan
    from kvrag.answer import Timing as Timing
    from kvrag.answer import TokenLogprob as TokenLogprob
    from kvrag.answer import Usage as Usage
    from kvrag.archive.archive import Archive as Archive
    from kvrag.archive.recall import Recall as Recall
    from kvrag.config import Context as Context
    from kvrag.config import Sampling as Sampling
    from kvrag.corpus import Corpus as Corpus
    from kvrag.engine import Engine as Engine
    from kvrag.errors import CacheMiss as CacheMiss
    from kvrag.errors import ConfigError as ConfigError
    from kvrag.errors import ContextOverflow as ContextOverflow
    from kvrag.errors import CorpusError as CorpusError
    from kvrag.errors import CorpusLocked as CorpusLocked
    from kvrag.errors import DocumentNotFound as DocumentNotFound
    from kvrag.errors import DocumentTooLong as DocumentTooLong
    from kvrag.errors import DuplicateDocument as DuplicateDocument
    from kvrag.errors import EmptyDocument as EmptyDocument
    from kvrag.errors import EngineClosed as EngineClosed
    from kvrag.errors import EntryTooLarge as EntryTooLarge
    from kvrag.errors import GenerationCancelled as GenerationCancelled
    from kvrag.errors import InputError as InputError
    from kvrag.errors import KVRagError as KVRagError
    from kvrag.errors import MissingExtra as MissingExtra
    from kvrag.errors import SessionDamaged as SessionDamaged
    from kvrag.errors import SessionError as SessionError
    from kvrag.errors import SessionSealed as SessionSealed
    from kvrag.errors import StoreError as StoreError
    from kvrag.errors import StoreWriteError as StoreWriteError
    from kvrag.errors import UnsupportedModel as UnsupportedModel
    from kvrag.errors import UploadsPending as UploadsPending
    from kvrag.focus.policy import Policy as Policy
    from kvrag.index import Index as Index
    from kvrag.known import KnownTexts as KnownTexts
    from kvrag.matching import ChunkMatcher as ChunkMatcher
    from kvrag.model import Model as Model
    from kvrag.plan import PromptPlan as PromptPlan
    from kvrag.prompt import RagPrompt as RagPrompt
    from kvrag.rag import ask as ask
    from kvrag.sessions.many import Sessions as Sessions
    from kvrag.sessions.session import Session as Session
    from kvrag.store.base import KVStore as KVStore
    from kvrag.store.disk import DiskStore as DiskStore
    from kvrag.store.memory import MemoryStore as MemoryStore
    from kvrag.store.tenants import Tenant as Tenant
    from kvrag.streams import AnswerStream as AnswerStream

    __version__ = version("kvrag")

__all__ = [
    "Answer",
    "AnswerStream",
    "CacheMiss",
    "ChunkMatcher",
    "ConfigError",
    "Context",
    "ContextOverflow",
    "CorpusError",
    "CorpusLocked",
    "DiskStore",
    "DocumentNotFound",
    "DocumentTooLong",
    "DocumentUse",
    "DuplicateDocument",
    "EmptyDocument",
    "Engine",
    "EngineClosed",
    "EntryTooLarge",
    "GenerationCancelled",
    "InputError",
    "KVRagError",
    "KVStore",
    "KnownTexts",
    "MemoryStore",
    "MemoryUse",
    "MissingExtra",
    "Model",
    "Piece",
    "Policy",
    "PromptPlan",
    "RagPrompt",
    "RecalledSpan",
    "Sampling",
    "Session",
    "SessionDamaged",
    "SessionError",
    "SessionSealed",
    "Sessions",
    "StoreError",
    "StoreWriteError",
    "Tenant",
    "Timing",
    "TokenLogprob",
    "UnsupportedModel",
    "UploadsPending",
    "Usage",
    "__version__",
]

_ROOMS = {
    "answer": "Answer DocumentUse MemoryUse Piece RecalledSpan Timing TokenLogprob Usage",
    "archive.archive": "Archive",
    "archive.recall": "Recall",
    "config": "Context Sampling",
    "corpus": "Corpus",
    "engine": "Engine",
    "errors": """CacheMiss ConfigError ContextOverflow CorpusError CorpusLocked DocumentNotFound
        DocumentTooLong DuplicateDocument EmptyDocument EngineClosed EntryTooLarge GenerationCancelled
        InputError KVRagError MissingExtra SessionDamaged SessionError SessionSealed StoreError
        StoreWriteError UnsupportedModel UploadsPending""",
    "focus.policy": "Policy",
    "index": "Index",
    "known": "KnownTexts",
    "matching": "ChunkMatcher",
    "model": "Model",
    "plan": "PromptPlan",
    "prompt": "RagPrompt",
    "rag": "ask",
    "sessions.many": "Sessions",
    "sessions.session": "Session",
    "store.base": "KVStore",
    "store.disk": "DiskStore",
    "store.memory": "MemoryStore",
    "store.tenants": "Tenant",
    "streams": "AnswerStream",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("kvrag")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF, "__version__"})

"""kvrag for LangChain: chains that read their documents from prebuilt KV caches.

`KVChroma` and `attach` need langchain-chroma, `KVCacheMiddleware` needs langchain: imported when
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from langchain_kvrag._serving import AnswerTimeout, ContextOverflowed
from langchain_kvrag.chat import ChatKVCache
from langchain_kvrag.docstore import KVDocStore
from langchain_kvrag.documents import KVCacheCompressor, KVCacheRetriever, relevance
from langchain_kvrag.embeddings import LexicalEmbeddings
from langchain_kvrag.llm import KVCacheLLM

if TYPE_CHECKING:
    from langchain_kvrag.chroma import KVChroma, attach
    from langchain_kvrag.middleware import KVCacheMiddleware

__all__ = [
    "AnswerTimeout",
    "ChatKVCache",
    "ContextOverflowed",
    "KVCacheCompressor",
    "KVCacheLLM",
    "KVCacheMiddleware",
    "KVCacheRetriever",
    "KVChroma",
    "KVDocStore",
    "LexicalEmbeddings",
    "attach",
    "relevance",
]

_ROOM_OF = {"KVChroma": "chroma", "attach": "chroma", "KVCacheMiddleware": "middleware"}


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)

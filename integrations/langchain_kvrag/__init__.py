"""kvrag for LangChain: chains that read their documents from prebuilt KV caches."""

from __future__ import annotations

from langchain_kvrag.chat import ChatKVCache
from langchain_kvrag.embeddings import LexicalEmbeddings
from langchain_kvrag.llm import KVCacheLLM

__all__ = ["ChatKVCache", "KVCacheLLM", "LexicalEmbeddings"]

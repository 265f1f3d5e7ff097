"""kvrag with LlamaIndex's Chroma vector store: caches that live and die with the nodes."""

from __future__ import annotations

from llama_index.vector_stores.kvrag.base import KVChromaVectorStore, kv_storage_context

__all__ = ["KVChromaVectorStore", "kv_storage_context"]

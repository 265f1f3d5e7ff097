"""kvrag's lexical embedding for LlamaIndex: needs no download, knows words and no meaning."""

from __future__ import annotations

from llama_index.embeddings.kvrag.base import LexicalEmbedding

__all__ = ["LexicalEmbedding"]

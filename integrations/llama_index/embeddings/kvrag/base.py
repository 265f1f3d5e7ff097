"""Hashed words as a LlamaIndex embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from kvrag.embedding import HashedEmbedding


class LexicalEmbedding(BaseEmbedding):
    """Unit vectors that are near if two texts share words; see `kvrag.embedding.HashedEmbedding`.

    A default for trials. The asynchronous methods compute at once: a text takes well under a millisecond.
    """

    size: int = Field(default=1024, description="Length of the vectors.")

    _embedding: HashedEmbedding = PrivateAttr()

    def __init__(self, size: int = 1024, **fields: Any) -> None:
        """Embed into vectors of this size."""
        super().__init__(**{"model_name": "kvrag_hashed", **fields, "size": size})
        self._embedding = HashedEmbedding(size=size)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's listings."""
        return "LexicalEmbedding"

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [np.asarray(vector, dtype=np.float32).tolist() for vector in self._embedding(texts)]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embedding(text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

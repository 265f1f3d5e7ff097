"""kvrag's lexical embedding for LangChain's vector stores: needs no download, knows words and no meaning."""

from __future__ import annotations

import numpy as np
from langchain_core.embeddings import Embeddings

from kvrag.embedding import HashedEmbedding


class LexicalEmbeddings(Embeddings):
    """Unit vectors that are near if two texts share words; see `kvrag.embedding.HashedEmbedding`.

    A default for trials. The asynchronous methods compute at once: a text takes well under a millisecond.

    Args:
        size: length of the vectors.
    """

    def __init__(self, size: int = 1024) -> None:
        self._embedding = HashedEmbedding(size=size)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text, in order."""
        return [np.asarray(vector, dtype=np.float32).tolist() for vector in self._embedding(texts)]

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question; the same as of a document with its text."""
        return self.embed_documents([text])[0]

"""Records and hits, as they are read from Chroma's answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import chromadb

from kvrag.errors import CorpusError


@dataclass(frozen=True, slots=True)
class Record:
    """One text of the collection."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hit:
    """A text that was found.

    Attributes:
        id: of its record.
        text: of its record.
        metadata: of its record.
        distance: in the collection's own measure; the nearer, the smaller.
        similarity: the cosine of the angle to what was searched for, if the vectors are unit vectors or the
            measure is the cosine.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    distance: float
    similarity: float


def records_in(found: chromadb.GetResult) -> list[Record]:
    """The records of an answer to `get`."""
    texts = found["documents"] or [""] * len(found["ids"])
    metadatas = found["metadatas"] or [{}] * len(found["ids"])
    rows = zip(found["ids"], texts, metadatas, strict=True)
    return [Record(i, text or "", dict(metadata or {})) for i, text, metadata in rows]


def rows_in(found: chromadb.QueryResult) -> Iterator[list[Record]]:
    """The records of an answer to `query`, for each text or vector that was searched for."""
    texts, metadatas = found["documents"], found["metadatas"]
    if texts is None or metadatas is None:
        raise CorpusError("Chroma's answer lacks documents or metadata")
    for row in zip(found["ids"], texts, metadatas, strict=True):
        yield [Record(i, text or "", dict(metadata or {})) for i, text, metadata in zip(*row, strict=True)]


def hits_in(found: chromadb.QueryResult, space: str) -> list[Hit]:
    """The hits of an answer to `query` for one text, by a collection that measures distances so."""
    texts, metadatas, distances = found["documents"], found["metadatas"], found["distances"]
    if texts is None or metadatas is None or distances is None:
        raise CorpusError("Chroma's answer lacks documents, metadata or distances")
    scale = 0.5 if space == "l2" else 1.0  # Chroma's l2 is the squared distance
    return [
        Hit(i, text, dict(metadata or {}), float(distance), 1 - scale * float(distance))
        for i, text, metadata, distance in zip(
            found["ids"][0], texts[0], metadatas[0], distances[0], strict=True
        )
    ]

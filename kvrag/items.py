"""What is encoded: records of a collection with the names of their entries; and who encodes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvrag.chroma_rows import Record
from kvrag.config import MAX_SIMILAR
from kvrag.parts import DOCUMENT_FIELD, PART_FIELD, part_of
from kvrag.segments import KV
from kvrag.store.key import EntryKey, Fingerprint

KEY_FIELD = "kvrag_key"
"""The metadata field that names a record's entry in the store; lacking while the entry is to be built."""

FROM_FIELD = "kvrag_from"
"""The metadata field with the number of the first part that a record is encoded behind; lacking if none."""

NEAR_FIELDS = tuple(f"kvrag_near_{n}" for n in range(1, MAX_SIMILAR + 1))
"""The fields that name similar chunks, most similar first; one each: Chroma then finds who is behind whom."""

RESERVED = (KEY_FIELD, DOCUMENT_FIELD, PART_FIELD, FROM_FIELD, *NEAR_FIELDS)


class Encoder(Protocol):
    """What reads texts for the corpus; the engine is one."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What its entries depend on besides their text."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest document it can read."""
        ...

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Tokens of a document."""
        ...

    def encode(self, token_lists: Sequence[tuple[int, ...]]) -> list[KV]:
        """Keys and values of documents, in order; each does not depend on the others."""
        ...


class ContextEncoder(Encoder, Protocol):
    """An encoder for corpora whose chunks are encoded behind others."""

    def context(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Tokens of texts between prefix and document, in order: those of each, one behind the other."""
        ...

    def fingerprint_behind(self, context: tuple[int, ...]) -> Fingerprint:
        """What entries behind such tokens depend on; with none, `fingerprint`."""
        ...

    def encode_behind(
        self, token_lists: Sequence[tuple[int, ...]], contexts: Sequence[tuple[int, ...]]
    ) -> list[KV]:
        """The same as `encode`, each document behind tokens of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """A record, the name of its entry and what that is encoded behind.

    Attributes:
        id: of the record.
        text: of the record.
        metadata: as the collection has it, with our fields.
        key: of the entry.
        labels: our fields as they should be, but for that of the key.
        context: tokens that the entry is encoded behind, beside the prefix.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    key: EntryKey
    labels: Mapping[str, str | int] = field(default_factory=dict)
    context: tuple[int, ...] = field(default=(), repr=False)

    @property
    def relabelling(self) -> dict[str, str | int | None]:
        """Our fields that the record lacks or has wrong; empty if all is as it should be."""
        labels = {KEY_FIELD: self.key.id, **self.labels}
        return {name: labels.get(name) for name in RESERVED if labels.get(name) != self.metadata.get(name)}

    def is_followed_by(self, other: Item) -> bool:
        """Whether the other one stands behind this one, so that both can be read in one go."""
        end = (*self.context, *self.key.tokens)
        return len(end) < len(other.context) and other.context[: len(end)] == end


def near_of(record: Record) -> list[str]:
    """Ids of the similar chunks that a record is noted to be encoded behind, most similar first."""
    return [str(record.metadata[name]) for name in NEAR_FIELDS if record.metadata.get(name)]


def first_of(record: Record) -> int:
    """Number of the first part that a record is noted to be encoded behind; its own number: behind none."""
    return int(record.metadata.get(FROM_FIELD, part_of(record) if KEY_FIELD in record.metadata else 0))


def clean(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without our fields."""
    return {name: value for name, value in metadata.items() if name not in RESERVED}

"""What chunks are encoded behind beside the prefix: their most similar chunks (FusionRAG, offline part).

A chunk's neighbours are chosen when it is written, and noted with it: chunks that come later do not change
them, so that adding one chunk encodes one chunk. `Corpus.renew_neighbours` chooses anew for all. A chunk
that loses a neighbour (deleted, or with another text) loses its entry at the same time, because rows that
were encoded behind a text tell of it, and gets new neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from kvrag.errors import ConfigError, DocumentTooLong, EmptyDocument, InputError
from kvrag.index import Index, Record
from kvrag.segments import KV
from kvrag.store.key import EntryKey, Fingerprint

KEY_FIELD = "kvrag_key"
"""The metadata field that names a record's entry in the store; lacking while the entry is to be built."""

MAX_NEIGHBOURS = 8
NEAR_FIELDS = tuple(f"kvrag_near_{n}" for n in range(1, MAX_NEIGHBOURS + 1))
"""The metadata fields that name a record's neighbours; one each, so that Chroma finds who is behind whom."""

RESERVED = (KEY_FIELD, *NEAR_FIELDS)

# Chunks with one text stand in each other's way: looked at are so many for each neighbour that is wanted.
_LOOKED_AT = 4


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
    """An encoder for corpora with neighbours."""

    def context(self, neighbours: Sequence[str]) -> tuple[int, ...]:
        """Tokens that stand between prefix and document for these neighbours, the most similar first."""
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
        near: ids of the neighbours, most similar first; also those that do not fit into the model.
        context: tokens of those that fit.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    key: EntryKey
    near: tuple[str, ...] = ()
    context: tuple[int, ...] = field(default=(), repr=False)

    @property
    def relabelling(self) -> dict[str, str | None]:
        """Our fields that the record lacks or has wrong; empty if all is as it should be."""
        labels = {KEY_FIELD: self.key.id, **dict(zip(NEAR_FIELDS, self.near, strict=False))}
        return {name: labels.get(name) for name in RESERVED if labels.get(name) != self.metadata.get(name)}


class Neighbourhoods:
    """Who is encoded behind whom in one collection, and how entries are called for it.

    Args:
        index: the collection; it notes how many neighbours its chunks have.
        encoder: reads the texts.
        count: most neighbours of a chunk; None: as many as the collection was built with.

    Raises:
        ConfigError: an impossible number, another one than the collection's, or an encoder that reads
            nothing behind anything.
    """

    def __init__(self, index: Index, encoder: Encoder, count: int | None = None) -> None:
        self._index = index
        self._encoder = encoder
        # Not isinstance: in Python 3.11 that reads every property, and they may refuse.
        self._contexts = cast(ContextEncoder, encoder) if hasattr(encoder, "encode_behind") else None
        self._asked = _checked(count)
        noted = index.neighbours
        if count is not None and noted not in (0, count):
            raise ConfigError(
                f"neighbours={count}: the chunks of this collection are encoded behind {noted}; leave the "
                f"argument out, then call renew_neighbours({count})"
            )
        if count:
            self.require_encoder()

    @property
    def count(self) -> int:
        """Most neighbours of a chunk that is written now; 0: this collection has nothing to do with them."""
        return self._index.neighbours or self._asked

    @property
    def can_encode(self) -> bool:
        """Whether the encoder reads texts behind others."""
        return self._contexts is not None

    def require_encoder(self) -> ContextEncoder:
        """The encoder.

        Raises:
            ConfigError: it cannot do it.
        """
        if self._contexts is None:
            raise ConfigError(
                "chunks are to be encoded behind their neighbours, and this encoder reads nothing behind "
                "anything: give the corpus the encoder of an engine"
            )
        return self._contexts

    def note(self, count: int | None = None) -> None:
        """Let the collection know how many, before the first chunk has any.

        Raises:
            ConfigError: an impossible number.
            CorpusLocked: another process is writing.
        """
        count = self.count if count is None else _checked(count)
        if count != self._index.neighbours:
            self._index.note_neighbours(count)
        self._asked = count

    def key_of(self, text: str, context: tuple[int, ...] = ()) -> EntryKey:
        """The key under which the store keeps a text that is encoded behind these tokens.

        Raises:
            EmptyDocument: no token.
            DocumentTooLong: more tokens than the model reads.
        """
        tokens = self._encoder.tokenize(text) if text.strip() else ()
        if not tokens:
            raise EmptyDocument("a document without text: nothing to encode")
        if len(tokens) > self._encoder.max_tokens:
            raise DocumentTooLong(
                f"{len(tokens)} tokens, the model reads {self._encoder.max_tokens} at most; cut it with "
                f"kvrag.documents.split(text, tokenize, {self._encoder.max_tokens}). It begins: {text[:60]!r}"
            )
        fingerprint = self._encoder.fingerprint
        if context:
            fingerprint = self.require_encoder().fingerprint_behind(context)
        return EntryKey(fingerprint, tokens)

    def items(
        self, records: Sequence[Record], unencodable: list[str], *, anew: int | None = None
    ) -> list[Item]:
        """Records of the collection with keys.

        Args:
            records: of the collection.
            unencodable: gets the ids of those that the model cannot read.
            anew: choose so many neighbours for each; None: keep those that are noted, and choose only for
                records that were never built or have lost one.
        """
        near: dict[str, list[Record]] = {}
        if anew is None and self.count:
            near = self._kept(records)
        count = self.count if anew is None else anew
        if count:
            near |= self._chosen([r for r in records if r.id not in near], count)
        items = []
        for record in records:
            try:
                items.append(self._item(record, near.get(record.id, [])))
            except InputError:
                unencodable.append(record.id)
        return items

    def texts(self, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """What the records' entries are encoded behind, most similar first."""
        if self._contexts is None or not self.count:
            return {}
        records = self._index.get(ids)
        there = self._there(records)
        return {
            r.id: self._fitting(r.text, [there[i].text for i in near_of(r) if i in there]) for r in records
        }

    def behind(self, ids: Iterable[str]) -> list[Record]:
        """The other records that are encoded behind these."""
        if not self.count:
            return []
        ids = list(dict.fromkeys(ids))
        found: dict[str, Record] = {}
        for start in range(0, len(ids), 500):
            among = {"$in": ids[start : start + 500]}
            for record in self._index.matching({"$or": [{name: among} for name in NEAR_FIELDS]}):
                found[record.id] = record
        return [record for record in found.values() if record.id not in set(ids)]

    def entries(self, records: Sequence[Record]) -> list[str]:
        """Names of all entries that tell of these records' texts, or of their neighbours'.

        Also of those that nobody refers to: answers under a policy with fewer neighbours leave them.
        """
        names = [str(record.metadata.get(KEY_FIELD, "")) for record in records]
        if not self.count or self._contexts is None:
            return names
        there = self._there(records)
        for record in records:
            near = [there[i].text for i in near_of(record) if i in there]
            for num in range(len(near) + 1):
                try:
                    names.append(self.key_of(record.text, self._contexts.context(near[:num])).id)
                except InputError:
                    break
        return names

    def _item(self, record: Record, near: Sequence[Record]) -> Item:
        context: tuple[int, ...] = ()
        if near:
            encoder = self.require_encoder()
            context = encoder.context(self._fitting(record.text, [n.text for n in near]))
        key = self.key_of(record.text, context)
        return Item(record.id, record.text, record.metadata, key, tuple(n.id for n in near), context)

    def _fitting(self, text: str, near: Sequence[str]) -> tuple[str, ...]:
        """The most similar ones, as many as the model reads in front of the text."""
        encoder = self.require_encoder()
        room = encoder.max_tokens - len(encoder.tokenize(text))
        return next(
            (tuple(near[:n]) for n in range(len(near), 0, -1) if len(encoder.context(near[:n])) <= room), ()
        )

    def _kept(self, records: Sequence[Record]) -> dict[str, list[Record]]:
        """Neighbours as noted, for records that have all of them."""
        there = self._there(records)
        return {
            r.id: [there[i] for i in near_of(r)]
            for r in records
            if KEY_FIELD in r.metadata and all(i in there for i in near_of(r))
        }

    def _chosen(self, records: Sequence[Record], count: int) -> dict[str, list[Record]]:
        """The most similar records that say something else, by the collection's own vectors."""
        found = self._index.nearest([r.id for r in records], 1 + _LOOKED_AT * count)
        chosen: dict[str, list[Record]] = {}
        for record in records:
            others: dict[str, Record] = {}
            for other in found.get(record.id, []):
                if other.text.strip() and other.text != record.text:
                    others.setdefault(other.text, other)
            chosen[record.id] = list(others.values())[:count]
        return chosen

    def _there(self, records: Sequence[Record]) -> dict[str, Record]:
        """Noted neighbours that are in the collection, by id."""
        ids = dict.fromkeys(i for record in records for i in near_of(record))
        return {record.id: record for record in self._index.get(list(ids))} if ids else {}


def near_of(record: Record) -> list[str]:
    """Ids of a record's neighbours, most similar first."""
    return [str(record.metadata[name]) for name in NEAR_FIELDS if record.metadata.get(name)]


def clean(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without our fields."""
    return {name: value for name, value in metadata.items() if name not in RESERVED}


def _checked(count: int | None) -> int:
    if count is not None and not 0 <= count <= MAX_NEIGHBOURS:
        raise ConfigError(f"neighbours={count}: expected 0 to {MAX_NEIGHBOURS}")
    return count or 0

"""What chunks are encoded behind, beside the prefix: the parts before them, or similar chunks, or nothing.

One mechanism for every rule (see `kvrag.config.Context`): what a chunk is encoded behind is a list of other
chunks, in the order in which a prompt would have them. It is noted beside the chunk, decides its entry's key
through the tokens that the entry is encoded behind, and rows that were encoded behind a text go when that
text is deleted or replaced.

* `before`: the parts before it in its document. They are read in runs: a document's first run begins with its
  first part; where a part does not fit behind its run any more, a new run begins that takes along the nearest
  parts before, as many as fill half of the room (at least one, if it fits). So every part stands behind the
  nearest parts before it, half a window of them or more, and a document is read twice at most.
* `similar`: its most similar chunks (FusionRAG, arXiv:2601.12904, offline part), the most similar one last;
  those at the other end are left out where they do not fit. They are chosen when the chunk is written: chunks
  that come later do not change them, so that adding one chunk encodes one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from kvrag.chroma_rows import Record
from kvrag.config import ALONE, Context
from kvrag.errors import ConfigError, DocumentTooLong, EmptyDocument, InputError
from kvrag.index import Index
from kvrag.items import (
    FROM_FIELD,
    KEY_FIELD,
    NEAR_FIELDS,
    ContextEncoder,
    Encoder,
    Item,
    first_of,
    near_of,
)
from kvrag.parts import DOCUMENT_FIELD, PART_FIELD, Parts, document_of, part_of
from kvrag.prompt import RagPrompt
from kvrag.store.key import EntryKey

# Chunks with one text stand in each other's way: looked at are so many for each that is wanted.
_LOOKED_AT = 4


class Contexts:
    """Who is encoded behind whom in one collection, and how entries are called for it.

    Args:
        index: the collection; it notes the rule.
        encoder: reads the texts.
        context: what chunks are encoded behind; None: what the collection was built with.

    Raises:
        ConfigError: another rule than the collection's, or an encoder that reads nothing behind anything.
    """

    def __init__(self, index: Index, encoder: Encoder, context: Context | None = None) -> None:
        self._index = index
        self._encoder = encoder
        self.parts = Parts(index)
        # Not isinstance: in Python 3.11 that reads every property, and they may refuse.
        self._behind = cast(ContextEncoder, encoder) if hasattr(encoder, "encode_behind") else None
        self._asked = context or ALONE
        noted = self._noted
        if context is not None and noted not in (ALONE, context):
            raise ConfigError(
                f"context {str(context)!r}: the chunks of this collection are encoded behind {str(noted)!r}; "
                "leave the argument out, then call renew_contexts with it"
            )
        if self._asked != ALONE:
            self.require_encoder()

    @property
    def _noted(self) -> Context:
        noted = self._index.context
        return ALONE if noted is None else Context.parse(noted)

    @property
    def context(self) -> Context:
        """What a chunk is encoded behind that is written now."""
        noted = self._noted
        return self._asked if noted == ALONE else noted

    @property
    def can_encode(self) -> bool:
        """Whether the encoder reads texts behind others."""
        return self._behind is not None

    def require_encoder(self) -> ContextEncoder:
        """The encoder.

        Raises:
            ConfigError: it cannot do it.
        """
        if self._behind is None:
            raise ConfigError(
                "chunks are to be encoded behind others, and this encoder reads nothing behind anything: "
                "give the corpus the encoder of an engine"
            )
        return self._behind

    def note(self, context: Context | None = None) -> None:
        """Let the collection know, before the first chunk is encoded behind another.

        Raises:
            CorpusLocked: another process is writing.
        """
        context = self.context if context is None else context
        if context != self._noted:
            self._index.note_context(str(context))
        self._asked = context

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
        self, records: Sequence[Record], unencodable: list[str], *, anew: Context | None = None
    ) -> list[Item]:
        """Records of the collection with keys.

        Args:
            records: of the collection.
            unencodable: gets the ids of those that the model cannot read.
            anew: choose by this; None: keep similar chunks that are noted, and choose only for records that
                were never built or have lost one.
        """
        rule, others = anew or self.context, dict[str, list[Record]]()
        if rule.rule == "before":
            others = self._before(records, rule)
        elif rule.rule == "similar":
            others = self._kept(records) if anew is None else {}
            others |= self._chosen([r for r in records if r.id not in others], rule.count)
        items = []
        for record in records:
            try:
                items.append(self._item(record, others.get(record.id, []), rule))
            except InputError:
                unencodable.append(record.id)
        return items

    def texts(self, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """What the records' entries are encoded behind, in the order of a prompt."""
        rule = self.context
        if self._behind is None or rule == ALONE:
            return {}
        records = self._index.get(ids)
        if rule.rule == "before":
            others = self.parts.between({r.id: (r, first_of(r)) for r in records})
        else:
            there = self._there(records)
            others = {r.id: [there[i] for i in reversed(near_of(r)) if i in there] for r in records}
        return {r.id: self._fitting(r.text, [o.text for o in others[r.id]], rule) for r in records}

    @property
    def prefix(self) -> str:
        """The text that the encoder reads documents behind, as far as it tells."""
        form = getattr(self._encoder, "prompt", None)
        return form.prefix if isinstance(form, RagPrompt) else ""

    def pieces(self, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """What the records' entries are encoded behind, piece by piece as a prompt has it; see `texts`."""
        form = getattr(self._encoder, "prompt", None)
        texts = self.texts(ids)
        return {i: form.before(t) for i, t in texts.items()} if isinstance(form, RagPrompt) else texts

    def telling(self, records: Sequence[Record]) -> list[Record]:
        """The other records whose entries are encoded behind these, by what is noted."""
        if self.context == ALONE:
            return []
        ids = [record.id for record in records]
        found = {record.id: record for record in self._near(ids)}
        for later, numbers in self.parts.later(records):
            # One that an interrupted call left without a label may have rows of any part before it.
            if KEY_FIELD not in later.metadata or any(
                first_of(later) <= number < part_of(later) for number in numbers
            ):
                found[later.id] = later
        return [record for record in found.values() if record.id not in set(ids)]

    def following(self, records: Sequence[Record]) -> list[str]:
        """Ids of the records that come behind these in their documents, so that their contexts may change."""
        if self.context.rule != "before":
            return []
        return [record.id for record, _ in self.parts.later(records)]

    def entries(self, records: Sequence[Record]) -> list[str]:
        """Names of all entries that tell of these records' texts, or of what they are encoded behind.

        Also of those that nobody refers to: answers may have left them.
        """
        names = [str(record.metadata.get(KEY_FIELD, "")) for record in records]
        if self.context == ALONE or self._behind is None:
            return names
        texts = self.texts([record.id for record in records])
        for record in records:
            for context in ((), texts.get(record.id, ())):
                try:
                    names.append(self.key_of(record.text, self._behind.context(context)).id)
                except InputError:
                    break
        return names

    def batches(self, records: Sequence[Record], size: int) -> Iterator[list[Record]]:
        """Runs of about `size` records; the parts of a document stay together if they are read in one go."""
        if self.context.rule != "before":
            yield from (list(records[start : start + size]) for start in range(0, len(records), size))
            return
        batch: list[Record] = []
        for group in grouped(records):
            batch += group
            if len(batch) >= size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _item(self, record: Record, others: Sequence[Record], rule: Context) -> Item:
        """The record with the others that it is to stand behind, in the order of a prompt."""
        context: tuple[int, ...] = ()
        labels: dict[str, str | int] = {
            name: record.metadata[name] for name in (DOCUMENT_FIELD, PART_FIELD) if name in record.metadata
        }
        if others:
            context = self.require_encoder().context(
                self._fitting(record.text, [o.text for o in others], rule)
            )
            if rule.rule == "before":
                labels[FROM_FIELD] = part_of(others[0])
            else:
                labels |= zip(NEAR_FIELDS, (o.id for o in reversed(others)), strict=False)
        key = self.key_of(record.text, context)
        return Item(record.id, record.text, record.metadata, key, labels, context)

    def _room(self, text: str, rule: Context) -> int:
        """Most tokens in front of a text."""
        room = self._encoder.max_tokens - len(self._encoder.tokenize(text))
        return room if rule.max_tokens is None else min(room, rule.max_tokens)

    def _fitting(self, text: str, others: Sequence[str], rule: Context) -> tuple[str, ...]:
        """The last ones, as many as there is room for in front of the text."""
        encoder, left, num = self.require_encoder(), self._room(text, rule), 0
        for other in reversed(others):
            left -= len(encoder.context([other]))
            if left < 0:
                break
            num += 1
        return tuple(others[len(others) - num :])

    def _before(self, records: Sequence[Record], rule: Context) -> dict[str, list[Record]]:
        """For each record, the parts before it in its run."""
        encoder, found = self.require_encoder(), dict[str, list[Record]]()
        for parts in self.parts.of(document_of(record) for record in records).values():
            lengths = [len(encoder.context([part.text])) for part in parts]
            rooms = [self._room(part.text, rule) for part in parts]
            for i, start in enumerate(run_starts(lengths, rooms)):
                found[parts[i].id] = [p for p in parts[start:i] if part_of(p) < part_of(parts[i])]
        return found

    def _kept(self, records: Sequence[Record]) -> dict[str, list[Record]]:
        """Similar chunks as noted, for records that have all of them."""
        there = self._there(records)
        return {
            r.id: [there[i] for i in reversed(near_of(r))]
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
            chosen[record.id] = list(others.values())[:count][::-1]
        return chosen

    def _near(self, ids: Iterable[str]) -> Iterator[Record]:
        """Records that are noted to be encoded behind these as similar ones."""
        ids = list(dict.fromkeys(ids))
        for start in range(0, len(ids), 500):
            among = {"$in": ids[start : start + 500]}
            yield from self._index.matching({"$or": [{name: among} for name in NEAR_FIELDS]})

    def _there(self, records: Sequence[Record]) -> dict[str, Record]:
        """Noted similar chunks that are in the collection, by id."""
        ids = dict.fromkeys(i for record in records for i in near_of(record))
        return {record.id: record for record in self._index.get(list(ids))} if ids else {}


def run_starts(lengths: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """For each part of a document, the first part that it is encoded behind; itself: behind none.

    >>> run_starts([4, 4, 4, 4, 4, 4], [12] * 6)  # three fit; a new run takes along what fills half
    [0, 0, 0, 0, 3, 3]

    Args:
        lengths: tokens of each part where another one stands behind it.
        rooms: most tokens in front of each part.
    """
    found, start, total = [], 0, 0
    for i, room in enumerate(rooms):
        if total > room:
            start, total = i, 0
            while start and (
                total + lengths[start - 1] <= room // 2 or (start == i and lengths[start - 1] <= room)
            ):
                start -= 1
                total += lengths[start]
        found.append(start)
        total += lengths[i]
    return found


def grouped(records: Iterable[Record]) -> list[list[Record]]:
    """Records by document, in order of first appearance, parts in order; others each on their own."""
    groups: dict[str | None, list[Record]] = {}
    alone: list[list[Record]] = []
    for record in records:
        document = document_of(record)
        if document is None:
            alone.append([record])
        else:
            groups.setdefault(document, []).append(record)
    return [sorted(group, key=lambda r: (part_of(r), r.id)) for group in groups.values()] + alone

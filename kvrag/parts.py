"""Which records of a collection are parts of one document, and in which order.

A part's document and number are noted beside it. Numbers grow along the document and may have gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvrag.chroma_rows import Record
from kvrag.index import Index

DOCUMENT_FIELD = "kvrag_document"
"""The metadata field that names the document whose part a record is; lacking if it is none's."""

PART_FIELD = "kvrag_part"
"""The metadata field with a part's number in its document, from 0."""

_AT_ONCE = 200  # conditions in one query


@dataclass(frozen=True, slots=True)
class Places:
    """Where records of one call stand.

    Attributes:
        of: document and number, by id; ids that are no document's part are left out.
        moved: new places of parts that are there already and make room.
    """

    of: dict[str, tuple[str, int]]
    moved: dict[str, tuple[str, int]] = field(default_factory=dict)


class Parts:
    """The parts of documents in one collection."""

    def __init__(self, index: Index) -> None:
        """Look into this collection."""
        self._index = index

    def of(self, documents: Iterable[str | None]) -> dict[str, list[Record]]:
        """All parts of documents by name, in order."""
        names = [name for name in dict.fromkeys(documents) if name is not None]
        found: dict[str, list[Record]] = {name: [] for name in names}
        for some in _some(names):
            for record in self._index.matching({DOCUMENT_FIELD: {"$in": some}}):
                found[str(document_of(record))].append(record)
        return {name: _sorted(parts) for name, parts in found.items()}

    def between(self, wanted: Mapping[str, tuple[Record, int]]) -> dict[str, list[Record]]:
        """Parts before records, from a number on, in order.

        Args:
            wanted: record and first number, by the record's id.
        """
        ranges = {
            i: (document_of(record), first, part_of(record))
            for i, (record, first) in wanted.items()
            if document_of(record) is not None and first < part_of(record)
        }
        conditions = [
            {"$and": [{DOCUMENT_FIELD: name}, {PART_FIELD: {"$gte": first}}, {PART_FIELD: {"$lt": end}}]}
            for name, first, end in dict.fromkeys(ranges.values())
        ]
        parts = _sorted({record.id: record for record in self._matching(conditions)}.values())
        found: dict[str, list[Record]] = {i: [] for i in wanted}
        for i, (name, first, end) in ranges.items():
            found[i] = [p for p in parts if document_of(p) == name and first <= part_of(p) < end]
        return found

    def later(self, records: Sequence[Record]) -> Iterator[tuple[Record, list[int]]]:
        """Parts behind these in their documents, and the numbers of these there."""
        numbers: dict[str, list[int]] = {}
        for record in records:
            document = document_of(record)
            if document is not None:
                numbers.setdefault(document, []).append(part_of(record))
        conditions = [
            {"$and": [{DOCUMENT_FIELD: name}, {PART_FIELD: {"$gt": min(some)}}]}
            for name, some in numbers.items()
        ]
        for found in self._matching(conditions):
            yield found, numbers[str(document_of(found))]

    def place(
        self,
        ids: Sequence[str],
        documents: Sequence[str | None],
        *,
        as_listed: bool = False,
        without: Iterable[str] = (),
    ) -> Places:
        """Give records of one call their places; those that have one in the same document may keep it.

        Args:
            ids: of the records, each once.
            documents: the document of each.
            as_listed: parts of one document are to stand together and in the order of `ids`, where the
                first of them stands that is there already; otherwise those that are there stay, and new ones
                go to the end.
            without: records that are about to go.
        """
        listed: dict[str, list[str]] = {}
        for record, document in zip(ids, documents, strict=True):
            if document is not None:
                listed.setdefault(document, []).append(record)
        leaving = set(without) | set(ids)
        places, moved = dict[str, tuple[str, int]](), dict[str, tuple[str, int]]()
        for document, parts in self.of(listed).items():
            there = {part.id: part_of(part) for part in parts}
            others = [i for i in there if i not in leaving]
            for i, number in _numbers(listed[document], others, there, as_listed=as_listed).items():
                if i not in leaving and number != there[i]:
                    moved[i] = document, number
                elif i in leaving:
                    places[i] = document, number
        return Places(places, moved)

    def _matching(self, conditions: Sequence[Mapping[str, Any]]) -> Iterator[Record]:
        for some in _some(conditions):
            yield from self._index.matching({"$or": some} if len(some) > 1 else some[0])


def _numbers(
    listed: Sequence[str], others: Sequence[str], there: Mapping[str, int], *, as_listed: bool
) -> dict[str, int]:
    """New numbers of all parts of a document, as few of them changed as there have to be."""
    mine = [there[i] for i in listed if i in there]
    if as_listed and mine:
        at = min(mine)
        order = [i for i in others if there[i] < at]
        order += [*listed, *(i for i in others if there[i] >= at)]
    elif as_listed:
        order = [*others, *listed]
    else:
        known = [*others, *(i for i in listed if i in there)]
        order = sorted(known, key=lambda i: (there[i], i)) + [i for i in listed if i not in there]
    numbers: dict[str, int] = {}
    number = -1
    for i in order:
        number = max(number + 1, there.get(i, 0))
        numbers[i] = number
    return numbers


def document_of(record: Record) -> str | None:
    """The document whose part a record is."""
    name = record.metadata.get(DOCUMENT_FIELD)
    return None if name is None else str(name)


def part_of(record: Record) -> int:
    """The record's number in its document."""
    return int(record.metadata.get(PART_FIELD, 0))


def _sorted(parts: Iterable[Record]) -> list[Record]:
    return sorted(parts, key=lambda record: (part_of(record), record.id))


def _some(items: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _AT_ONCE):
        yield list(items[start : start + _AT_ONCE])

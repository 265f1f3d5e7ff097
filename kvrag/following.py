"""Registries that follow a collection: what is written to it becomes known, what is deleted is forgotten."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from kvrag.chroma_rows import Record
from kvrag.known import KnownTexts, Resolver

_PAGE = 1000


class Followers:
    """The registries of one collection; they may go whenever nobody else holds them.

    Args:
        contexts: tells what records are encoded behind.
    """

    def __init__(self, contexts: Resolver) -> None:
        self._contexts = contexts
        self._known: list[weakref.ref[KnownTexts]] = []

    def add(self, known: KnownTexts, records: Iterator[Record]) -> None:
        """Fill a registry page by page, and let it follow."""
        while page := list(islice(records, _PAGE)):
            known.update({record.id: record.text for record in page}, self._contexts)
        if all(other() is not known for other in self._known):
            self._known.append(weakref.ref(known))

    def tell(self, new: Mapping[str, str], gone: Sequence[str] = ()) -> None:
        """Records were written or deleted."""
        for reference in list(self._known):
            known = reference()
            if known is None:
                self._known.remove(reference)
            else:
                if gone:
                    known.remove(*gone)
                if new:
                    known.update(new, self._contexts)

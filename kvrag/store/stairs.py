"""What reading and writing of a stack of tiers have in common."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager

from kvrag.errors import StoreError
from kvrag.store.base import Receipt
from kvrag.store.journal import Journal
from kvrag.store.stack import Tier

logger = logging.getLogger(__name__)

TROUBLE = (StoreError, OSError)
"""What a tier may raise, and one that is no store of ours."""
_LOCKS = 256


class Stairs:
    """The tiers, what they owe each other, and what keeps moves of one entry apart.

    Args:
        tiers: the fastest first.
        lasting: those that outlive the process; if none does, the last.
        journal: pending uploads and deletions.

    Attributes:
        counts: what has happened, by name.
    """

    def __init__(self, tiers: Sequence[Tier], lasting: Sequence[Tier], journal: Journal) -> None:
        self.tiers, self.lasting, self.journal = list(tiers), list(lasting), journal
        self.counts: Counter[str] = Counter()
        self._count_lock = threading.Lock()
        self._locks = [threading.RLock() for _ in range(_LOCKS)]

    def locked(self, key_id: str) -> AbstractContextManager[bool]:
        """What keeps moves and deletions of one entry apart."""
        return self._locks[hash(key_id) % _LOCKS]

    def count(self, *names: str) -> None:
        """Add one to each of these."""
        with self._count_lock:
            self.counts.update(names)

    def is_erased(self, key_id: str) -> bool:
        """Whether the entry was deleted and not put again, or nobody can tell."""
        try:
            return self.journal.is_erased(key_id)
        except (sqlite3.Error, *TROUBLE) as error:
            # What was deleted must not come back because a file cannot be read.
            logger.warning("entry %s is a miss: what was deleted cannot be read: %s", key_id[:12], error)
            return True

    def erase(self, key_id: str, tiers: Sequence[Tier]) -> tuple[list[Receipt], dict[str, Exception]]:
        """Delete in these tiers, as far as they can be reached, and note which have confirmed it."""
        receipts: list[Receipt] = []
        failures: dict[str, Exception] = {}
        for tier in tiers:
            try:
                receipts.append(tier.store.delete(key_id))
            except TROUBLE as error:
                failures[tier.name] = error
        self.journal.confirm(key_id, [tier.name for tier in tiers if tier.name not in failures])
        return receipts, failures

"""Writing to a stack of tiers: through all of them at once, or back to the lower ones later."""

from __future__ import annotations

import errno
import logging
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import replace

from kvrag.errors import CacheMiss, EntryTooLarge, StoreWriteError
from kvrag.segments import KV
from kvrag.store.key import EntryKey
from kvrag.store.layout import Damaged
from kvrag.store.moving import MovesBytes
from kvrag.store.stack import Tier
from kvrag.store.stairs import TROUBLE, Stairs

logger = logging.getLogger(__name__)


class Lowering:
    """Writes entries to the tiers that last.

    Args:
        stairs: the tiers.
        writes_back: to the first, and note what the others are to get.
    """

    def __init__(self, stairs: Stairs, *, writes_back: bool) -> None:
        self._stairs, self.writes_back = stairs, writes_back

    def write(self, key: EntryKey, kv: KV, cost_seconds: float, ttl_seconds: float | None) -> None:
        """Write to the first lasting tier and, through it, to the others, or note that they are to get it."""
        first, *others = self._stairs.lasting
        if self.writes_back:
            names = [tier.name for tier in others]
            # Noted before: an entry that is there is either uploaded or pending, whenever a crash comes.
            self._stairs.journal.owe(key.id, names)
            try:
                first.store.put(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)
            except BaseException:
                for name in names:
                    self._stairs.journal.settle(key.id, name, unless=lambda: key.id in first.store)
                raise
            # And after: another process may have looked for it in between, and given it up.
            self._stairs.journal.owe(key.id, names)
            self._stairs.journal.revive(key.id)
            return
        new = [tier for tier in self._stairs.lasting if key.id not in tier.store]
        try:
            first.store.put(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)
            for tier in others:
                if first.mover is not None and tier.mover is not None:
                    self._move(first.mover, tier.mover, key.id, cost_seconds, ttl_seconds)
                else:
                    tier.store.put(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)
            self._stairs.journal.revive(key.id)
        except BaseException:
            self._undo(key.id, new)
            raise

    def upload(self, key_id: str, name: str) -> bool:
        """Bring a pending entry from the first lasting tier to another; False if it has to wait."""
        target = next((tier for tier in self._stairs.lasting[1:] if tier.name == name), None)
        source = self._stairs.lasting[0].mover
        if target is None or target.mover is None or source is None:
            return False  # of a tier that is not there this time
        with self._stairs.locked(key_id):
            while self._stairs.journal.is_pending(key_id, name):
                was_there = key_id in self._stairs.lasting[0].store
                try:
                    target.mover.import_bytes(source.export_bytes(key_id))
                except (CacheMiss, Damaged, EntryTooLarge) as error:
                    self._give_up(key_id, name, error, was_there=was_there)
                except TROUBLE as error:
                    self._stairs.count("write_failures")
                    logger.warning("entry %s could not be uploaded: %s", key_id[:12], error)
                    return False
                else:
                    self._stairs.journal.settle(key_id, name)
        return True

    def hold_pending(self) -> None:
        """Hold what earlier processes have left to upload."""
        try:
            self._stairs.journal.hold_pending()
        except (sqlite3.Error, *TROUBLE) as error:
            logger.warning("entries may be evicted before they are uploaded: %s", error)

    def _move(
        self, source: MovesBytes, target: MovesBytes, key_id: str, cost: float, ttl_seconds: float | None
    ) -> None:
        """Copy an entry that was just put.

        Raises:
            StoreWriteError: it cannot be read again, or not be written.
        """
        try:
            entry = source.export_bytes(key_id)
            expires = entry.expires
            if expires is None and ttl_seconds is not None:
                expires = time.time() + ttl_seconds
            target.import_bytes(replace(entry, cost_seconds=entry.cost_seconds or cost, expires=expires))
        except (CacheMiss, Damaged) as error:
            what = f"entry {key_id[:12]} was written and cannot be read: {error}"
            raise StoreWriteError(errno.EIO, what) from error

    def _undo(self, key_id: str, tiers: Sequence[Tier]) -> None:
        for tier in tiers:
            try:
                tier.store.delete(key_id)
            except TROUBLE as error:
                logger.warning(
                    "entry %s was not put and may still be in %s: %s", key_id[:12], tier.name, error
                )

    def _give_up(self, key_id: str, name: str, error: Exception, *, was_there: bool) -> None:
        """Settle what cannot be uploaded, unless a process that had noted it has written it meanwhile."""
        first = self._stairs.lasting[0].store
        if self._stairs.journal.settle(key_id, name, unless=lambda: not was_there and key_id in first):
            logger.warning("entry %s will not be uploaded: %s", key_id[:12], error)

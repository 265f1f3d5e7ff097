"""Reading from a stack of tiers: what a lower one has is brought into those above."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from kvrag.errors import CacheMiss
from kvrag.segments import KV
from kvrag.store.found import Found, find
from kvrag.store.key import EntryKey
from kvrag.store.layout import Damaged
from kvrag.store.moving import EntryBytes
from kvrag.store.stack import Tier, info_of
from kvrag.store.stairs import TROUBLE, Stairs

logger = logging.getLogger(__name__)


class Raising:
    """Finds entries in tiers, and raises them.

    Args:
        stairs: the tiers.
    """

    def __init__(self, stairs: Stairs) -> None:
        self._stairs = stairs

    def find(self, number: int, key: EntryKey, *, by_layer: bool) -> Found | None:
        """The entry as one tier has it, brought into those before; None if it has none that is usable."""
        tier = self._stairs.tiers[number]
        above = [t for t in self._stairs.tiers[:number] if t.mover is not None]
        try:
            if tier.mover is not None and above:
                kv = self._raised(tier, above, key, by_layer=by_layer)
                found = None if kv is None else Found(kv, tier.name)
            else:
                found = find(tier.store, key, by_layer=by_layer)
            return None if found is None else replace(found, kv=self._kept(number, key, found.kv))
        except CacheMiss:
            return None
        except TROUBLE as error:
            logger.warning("entry %s cannot be read from %s: %s", key.id[:12], tier.name, error)
            return None

    def _raised(self, tier: Tier, above: Sequence[Tier], key: EntryKey, *, by_layer: bool) -> KV | None:
        """Bring an entry's bytes into the tiers above that hold bytes, and read it there.

        Where none of them takes it, it is read from where it lies.
        """
        assert tier.mover is not None
        with self._stairs.locked(key.id):
            entry = tier.mover.export_bytes(key.id)
            if self._stairs.is_erased(key.id) or (entry.expires is not None and entry.expires <= time.time()):
                return None
            try:
                taken = [upper for upper in above if self._takes(upper, tier, entry)]
            except Damaged:
                return tier.store.get(key)  # finds it, too, and sets it aside; or it was replaced meanwhile
            if self._stairs.is_erased(key.id):  # another process deleted it while it was under way
                self._stairs.erase(key.id, taken)
                return None
            for upper in taken:
                try:
                    return upper.store.get(key, by_layer=by_layer)
                except TROUBLE:
                    continue  # no room to stay there, or not of this key
        return tier.store.get(key, by_layer=by_layer)

    def _takes(self, upper: Tier, lower: Tier, entry: EntryBytes) -> bool:
        """Whether an upper tier has taken an entry.

        Raises:
            Damaged: there is nothing to be taken.
        """
        assert upper.mover is not None
        try:
            upper.mover.import_bytes(entry)
        except TROUBLE as error:
            self._stairs.count("write_failures")
            logger.warning("entry %s stays in %s alone: %s", entry.id[:12], lower.name, error)
            return False
        return True

    def _kept(self, number: int, key: EntryKey, kv: KV) -> KV:
        """The rows where the uppermost tier of memory keeps them now; as they are if none does.

        Raises:
            CacheMiss: rows that are read when touched are damaged.
        """
        filled = [t.memory for t in self._stairs.tiers[:number] if t.memory is not None and t.is_filled]
        info = info_of(self._stairs.tiers[number].store, key.id) if filled else None
        cost, ttl = 0.0, None
        if info is not None:
            cost = info.cost_seconds
            ttl = None if info.expires is None else max(1e-6, info.expires - time.time())
        for memory in reversed(filled):
            with self._stairs.locked(key.id):
                if not self._stairs.is_erased(key.id):
                    kv = memory.keep(key, kv, cost_seconds=cost, ttl_seconds=ttl) or kv
        return kv

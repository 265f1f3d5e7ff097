"""Several stores as one: the fast ones in front, the lasting and the shared ones behind."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from kvrag.errors import CacheMiss, ConfigError, StoreError, StoreWriteError, UploadsPending
from kvrag.segments import KV
from kvrag.store.base import CheckReport, EntryInfo, KVStore, Receipt, StoreStats, check_rows
from kvrag.store.disk import DiskStore
from kvrag.store.found import Found, Place, counts_of, locate, tiers_of
from kvrag.store.journal import Holds, Journal
from kvrag.store.key import EntryKey
from kvrag.store.lowering import Lowering
from kvrag.store.raising import Raising
from kvrag.store.sealing import MasterKey
from kvrag.store.stack import TierStats, info_of, merged, placed
from kvrag.store.stairs import TROUBLE, Stairs
from kvrag.store.traffic import Traffic
from kvrag.store.uploads import Uploads

logger = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{64}")


class TieredStore:
    """Reads from the first tier that has an entry, and brings it into those before.

    Entries move between disk and objects as bytes, compressed and encrypted as they are; a tier in which an
    entry is damaged is passed over, and mended by the next one. Rows on disk are mapped, and never copied
    into main memory: a `MemoryTier` there, in front of a `DiskStore`, stays empty unless it is pinned (for a
    GPU) or `copy_mapped` says otherwise.

    `delete` erases in every tier. A tier that cannot be reached then makes it fail, is remembered (until
    `sweep` has erased there, too), and never brings the entry back. Other machines' own disks are not
    reached: only the tiers given are.

    Args:
        tiers: the fastest first; none of them twice.
        write: "through": `put` returns when all tiers have the entry, or raises and none has; "back": when
            the first that lasts has it, and a thread brings it to the others, which a crash only interrupts.
        state: file that remembers uploads and deletions; None: `tiers.sqlite` in the folder of the first
            `DiskStore`, or in memory where there is none.
        copy_mapped: fill tiers of main memory in front of a disk.
        close_seconds: how long `close` waits for uploads, and `put` where only what is to be uploaded could
            make room for it.

    Raises:
        ConfigError: no tiers, or tiers that cannot be written back to.
    """

    def __init__(
        self,
        tiers: Sequence[KVStore],
        *,
        write: Literal["through", "back"] = "through",
        state: str | Path | None = None,
        copy_mapped: bool = False,
        close_seconds: float = 10.0,
    ) -> None:
        if not tiers or len({id(tier) for tier in tiers}) != len(tiers):
            raise ConfigError(f"{len(tiers)} tiers: expected at least one, and each of them once")
        if write not in ("through", "back"):
            raise ConfigError(f"write={write!r}: expected 'through' or 'back'")
        self._tiers = placed(tiers, copy_mapped)
        # What lasts; if nothing does, the last of what does not.
        lasting = [t for t in self._tiers if t.memory is None] or self._tiers[-1:]
        if write == "back" and any(t.mover is None for t in lasting):
            raise ConfigError("write='back' needs tiers that move bytes, such as DiskStore and ObjectStore")
        disk, source = self.disk, lasting[0].store
        self._journal = Journal(
            disk.path / "tiers.sqlite" if state is None and disk else state,
            source if isinstance(source, Holds) else None,
        )
        self._traffic = Traffic()
        self._stairs = Stairs(self._tiers, lasting, self._journal)
        self._raising = Raising(self._stairs)
        self._lowering = Lowering(self._stairs, writes_back=write == "back")
        names = [tier.name for tier in lasting[1:]]
        self._uploads = Uploads(self._journal, self._lowering.upload, self._traffic, names)
        self._close_seconds = close_seconds
        if self._lowering.writes_back:
            self._lowering.hold_pending()
            self._uploads.wake()

    @property
    def disk(self) -> DiskStore | None:
        """The first tier on a disk of this machine, if there is one."""
        return next((tier.store for tier in self._tiers if isinstance(tier.store, DiskStore)), None)

    @property
    def master_key(self) -> MasterKey | None:
        """What the entries that last are encrypted with; None: they are not."""
        keys = (getattr(tier.store, "master_key", None) for tier in self._stairs.lasting)
        return next((key for key in keys if key is not None), None)

    @property
    def traffic(self) -> Traffic:
        """Reads under way, for work that can wait."""
        return self._traffic

    # --- the store ---

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Return the entry's rows from the first tier that has them; see `find` and `KVStore.get`."""
        return self.find(key, by_layer=by_layer).kv

    def find(self, key: EntryKey, *, by_layer: bool = False) -> Found:
        """The same, and which tier that was.

        With `by_layer`, a layer that is found damaged when it is touched makes the caller start over, and the
        next `get` finds the entry in the next tier.
        """
        with self._traffic.reading():
            if not self._stairs.is_erased(key.id):
                for number, tier in enumerate(self._tiers):
                    found = self._raising.find(number, key, by_layer=by_layer)
                    if found is not None:
                        self._stairs.count("hits", f"hits {tier.name}")
                        return found
        self._stairs.count("misses")
        raise CacheMiss(f"no usable entry {key.id[:12]} in {', '.join(t.name for t in self._tiers)}")

    @property
    def tier_names(self) -> tuple[str, ...] | None:
        """Where rows may have to be read from; None: a tier does not say."""
        names = [tiers_of(tier.store) for tier in self._tiers]
        return None if None in names else tuple(name for some in names for name in some or ())

    def locate(self, key: EntryKey) -> Place | None:
        """The first tier that has the entry; one that would have to ask a network is presumed to."""
        if self._stairs.is_erased(key.id):
            return None
        places = (locate(tier.store, key) for tier in self._tiers)
        return next((place for place in places if place is not None), None)

    def counts(self) -> dict[str, int]:
        """Sums of what the tiers count; see `Counting`."""
        total: Counter[str] = Counter()
        for tier in self._tiers:
            total.update(counts_of(tier.store))
        total["write_failures"] += self._stairs.counts["write_failures"]
        return dict(total)

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Keep the rows in the tiers; see `write` for what is certain when it returns.

        Raises:
            ConfigError: the rows are not of this key.
            StoreWriteError: nothing was written, and what was there before is still there.
            UploadsPending: the same, because everything that could go for it has not been uploaded yet.
        """
        check_rows(key, kv)
        end = time.monotonic() + self._close_seconds
        try:
            while not self._put(key, kv, cost_seconds, ttl_seconds, may_wait=time.monotonic() < end):
                self._uploads.wake()
                if not self._uploads.wait_for_one(end - time.monotonic()):
                    end = 0.0  # the next try is the last
        except TROUBLE as error:
            self._stairs.count("write_failures")
            if isinstance(error, StoreError):
                raise
            raise StoreWriteError(error.errno, f"nothing was written: {error}") from error
        if self._lowering.writes_back:
            self._uploads.wake()

    def _put(
        self, key: EntryKey, kv: KV, cost_seconds: float, ttl_seconds: float | None, *, may_wait: bool
    ) -> bool:
        """Keep the rows; false if uploads have to be waited for, without a lock that they need."""
        with self._stairs.locked(key.id):
            try:
                self._lowering.write(key, kv, cost_seconds, ttl_seconds)
            except UploadsPending:
                if not (may_wait and self._lowering.writes_back):
                    raise
                return False
            for tier in self._tiers:
                if tier.memory is not None and tier.is_filled and tier not in self._stairs.lasting:
                    tier.memory.keep(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)
        return True

    def delete(self, key_id: str) -> Receipt:
        """Erase the entry in every tier, and cancel its uploads.

        Raises:
            StoreWriteError: the message says which tiers may still hold it; it is a miss all the same from
                now on, and `sweep` tries again.
        """
        if not _ID.fullmatch(key_id):
            return Receipt(key_id, False)
        with self._stairs.locked(key_id):
            self._journal.erase(key_id, [tier.name for tier in self._tiers])
            receipts, failures = self._stairs.erase(key_id, self._tiers)
        if failures:
            what = "; ".join(f"{name}: {error}" for name, error in failures.items())
            raise StoreWriteError(
                errno.EIO,
                f"entry {key_id[:12]} may still be in {', '.join(failures)} ({what}); it is a miss from now "
                "on, and sweep() erases it there once it can be reached",
            )
        return merged(key_id, receipts)

    def __contains__(self, key: object) -> bool:
        """Whether any tier has an entry under this `EntryKey` or id; does not read it."""
        key_id = key.id if isinstance(key, EntryKey) else key
        if not isinstance(key_id, str) or not _ID.fullmatch(key_id) or self._stairs.is_erased(key_id):
            return False
        return any(key_id in tier.store for tier in self._tiers)

    def ids(self) -> Iterator[str]:
        """Ids of all entries of all tiers, each once."""
        erased = self._journal.erased()
        found = dict.fromkeys(key_id for tier in self._tiers for key_id in tier.store.ids())
        return iter([key_id for key_id in found if key_id not in erased])

    def stats(self) -> StoreStats:
        """Counts of this object; entries once, their bytes in every tier that holds them."""
        own, tiers = self._stairs.counts, [tier.store.stats() for tier in self._tiers]
        return StoreStats(
            entries=sum(1 for _ in self.ids()),
            num_bytes=sum(stats.num_bytes for stats in tiers),
            hits=own["hits"],
            misses=own["misses"],
            damaged=sum(stats.damaged for stats in tiers),
            write_failures=own["write_failures"],
            bytes_read=sum(stats.bytes_read for stats in tiers),
            evictions=sum(stats.evictions for stats in tiers),
            evicted_bytes=sum(stats.evicted_bytes for stats in tiers),
        )

    def tier_stats(self) -> list[TierStats]:
        """Counts of every tier, the fastest first."""
        pending = Counter(tier for _, tier in self._journal.pending())
        return [
            TierStats(t.name, self._stairs.counts[f"hits {t.name}"], pending[t.name], t.store.stats())
            for t in self._tiers
        ]

    def info(self, key_id: str) -> EntryInfo | None:
        """What the first tier that has the entry knows of it; None if none knows."""
        for tier in self._tiers:
            info = None if self._stairs.is_erased(key_id) else info_of(tier.store, key_id)
            if info is not None:
                return info
        return None

    def pin(self, key_id: str, pinned: bool = True) -> bool:
        """Let no tier evict the entry, or all again; False if no tier has it."""
        pins = [pin for tier in self._tiers if (pin := getattr(tier.store, "pin", None)) is not None]
        done = [pin(key_id, pinned) for pin in pins]  # in all of them, not only in the first
        return any(done)

    def check(self, *, fix: bool = False) -> CheckReport:
        """Verify every entry of every tier; what is set aside comes back from another when it is read."""
        damaged: dict[str, None] = {}
        orphans: list[str] = []
        for tier in self._tiers:
            found = tier.store.check(fix=fix)
            damaged.update(dict.fromkeys(found.damaged))
            orphans += [f"{tier.name}: {name}" for name in found.orphans]
        return CheckReport(tuple(damaged), tuple(orphans), fixed=fix)

    def sweep(self, *, grace_seconds: float = 3600.0) -> tuple[Receipt, ...]:
        """Erase what could not be erased before, and let every tier tidy up; what was erased by that.

        Entries that are held for uploads which are done, or were given up, are let go of.

        Args:
            grace_seconds: how long deletions are remembered after all tiers have confirmed them.
        """
        named = {tier.name: tier for tier in self._tiers}
        receipts = []
        for key_id, name in self._journal.unconfirmed():
            with self._stairs.locked(key_id):
                if name in named and (key_id, name) in self._journal.unconfirmed():
                    done, failures = self._stairs.erase(key_id, [named[name]])
                    receipts += done
                    for error in failures.values():
                        logger.warning("entry %s may still be in %s: %s", key_id[:12], name, error)
        self._journal.forget(grace_seconds)
        try:
            self._journal.release_settled()
        except TROUBLE as error:
            logger.warning("what was uploaded may stay held: %s", error)
        for tier in self._tiers:
            sweep = getattr(tier.store, "sweep", None)
            try:
                if sweep is not None:
                    sweep()
            except TROUBLE as error:
                logger.warning("%s could not be swept: %s", tier.name, error)
        return tuple(receipts)

    def flush(self, timeout_seconds: float | None = None) -> int:
        """Try all pending uploads now; how many are still pending after that, or after so long."""
        return self._uploads.flush(timeout_seconds)

    def close(self) -> None:
        """Wait for uploads, but not for ever, and close the tiers; what is pending stays so."""
        end = time.monotonic() + self._close_seconds
        left = self._uploads.flush(self._close_seconds)
        self._uploads.close(max(0.1, end - time.monotonic()))
        if left:
            logger.warning("%d uploads are left for the next time", left)
        self._journal.close()
        for tier in self._tiers:
            tier.store.close()

"""Changing entries: written, renewed, taken over, evicted, deleted; the files first, then the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvrag.errors import StoreWriteError
from kvrag.segments import KV
from kvrag.store import layout
from kvrag.store.base import Receipt
from kvrag.store.clock import StoreClock
from kvrag.store.counts import Counts
from kvrag.store.files import commit as rename
from kvrag.store.files import make_folder, sync_folder
from kvrag.store.folder import EntryFolder, NewEntry
from kvrag.store.hits import Hits
from kvrag.store.index import Victim
from kvrag.store.key import EntryKey
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.ledger import Ledger
from kvrag.store.loading import Loader
from kvrag.store.room import Limits

_MAX_TOGETHER = 64  # two open files each


class Writer:
    """Changes the entries of one folder, each change under the store's lock.

    Every method may raise `OSError`, if a file cannot be changed, and `StoreWriteError`, if something does
    not fit; nothing is left half done then that anybody could read.

    Args:
        folder: the entries' files.
        ledger: their index.
        clock: the store's clock.
        limits: how much may be there.
        hits: loads that the index has to know before it says what goes.
        loader: tells whether an entry is intact, and forgets entries.
        counts: what is counted.
    """

    def __init__(
        self,
        folder: EntryFolder,
        ledger: Ledger,
        clock: StoreClock,
        limits: Limits,
        hits: Hits,
        loader: Loader,
        counts: Counts,
    ) -> None:
        self._folder = folder
        self._ledger = ledger
        self._clock = clock
        self._limits = limits
        self._hits = hits
        self._loader = loader
        self._counts = counts

    def put(
        self, entries: Sequence[tuple[EntryKey, KV]], costs: Mapping[str, float], ttl_seconds: float | None
    ) -> None:
        """Have intact entries of these rows, `costs` by id; see `DiskStore.put_many`."""
        missing = []
        for key, kv in {key.id: (key, kv) for key, kv in entries}.values():
            before = self._intact(key)
            if before is None:
                missing.append((key, kv))
            elif costs[key.id] or ttl_seconds is not None or before.expires is not None:
                self._renew(key, costs[key.id], ttl_seconds)
        for start in range(0, len(missing), _MAX_TOGETHER):
            self._write(missing[start : start + _MAX_TOGETHER], costs, ttl_seconds)

    def put_bytes(self, key_id: str, manifest: Manifest, data: Sequence[bytes | memoryview]) -> bool:
        """Write an entry as it lies in another store; false if one is here already."""
        self._folder.filters.check_taken_over(manifest.filters, manifest.key_id)
        self._prepare(manifest)
        with self._folder.writing([(key_id, manifest, data)]) as commit, self._ledger.locked():
            if self._folder.exists(key_id):
                return False
            self._commit({key_id: manifest}, partial(commit, [key_id]))
        return True

    def adopt(self, key_id: str, manifest: Manifest, files: tuple[Path, Path]) -> bool:
        """Rename another store's files (manifest, data) to ours; false if the entry is here already."""

        def commit() -> None:
            for theirs, mine in zip(reversed(files), reversed(self._folder.files(key_id)), strict=True):
                rename(theirs, mine)  # the manifest last: with it there is an entry

        self._folder.filters.check_taken_over(manifest.filters, manifest.key_id)
        self._prepare(manifest)
        make_folder(self._folder.files(key_id)[0].parent)
        with self._ledger.locked():
            if self._folder.exists(key_id):
                return False
            self._commit({key_id: manifest}, commit)
        return True

    def expire(self, key_id: str, ttl_seconds: float | None) -> bool:
        """Give an entry another end; false if there is none."""
        with self._ledger.locked():
            try:
                (before, _), now = self._folder.revealed(key_id), self._clock.now()
            except Damaged:
                return False  # deleted since, or not worth it
            manifest = replace(before, created=now, expires=_end(now, ttl_seconds))
            manifest = layout.resealed(manifest, self._folder.filters)
            with self._ledger.changing([key_id], {key_id: manifest}):
                self._folder.rewrite(key_id, manifest)
        return True

    def pin(self, key_id: str, pinned: bool) -> bool:
        """Pin an entry or let go of it; false if there is none."""
        with self._ledger.locked():
            if not self._folder.exists(key_id):
                return False
            with self._ledger.changing([key_id]):
                self._folder.pin(key_id, pinned)
        return True

    def hold(self, key_ids: Sequence[str], held: bool) -> None:
        """Keep entries from eviction, or no longer; not while some are being evicted."""
        with self._ledger.locked():
            for key_id in key_ids:
                self._folder.hold(key_id, held)

    def delete(self, key_id: str) -> Receipt:
        """Remove every trace of an entry, its pin first: it must not come to life again pinned."""
        self._loader.kept.drop(key_id)
        if not self._folder.traces(key_id):
            return Receipt(key_id, False)
        with self._ledger.locked():
            return self._delete(key_id)

    def evict(self, victims: Sequence[Victim]) -> None:
        """Erase entries that are too many; the caller holds the lock."""
        floor = max((victim.priority for victim in victims), default=0.0)
        with self._ledger.changing([victim.id for victim in victims], floor=floor):
            self._erase(victims)

    def _prepare(self, manifest: Manifest) -> None:
        """Refuse what can never fit; else let the index know what was used, before it is asked what goes.

        Not with the lock held: the thread that writes the counts may wait for it.
        """
        self._limits.check_size(tenant_of(manifest), size_of(manifest))
        if self._limits.of(tenant_of(manifest)):
            self._hits.flush()

    def _intact(self, key: EntryKey) -> Manifest | None:
        """The manifest of an entry of which every byte is right; None: there is no such entry."""
        if not self._loader.is_intact(key):
            return None
        try:
            return self._folder.revealed(key.id)[0]
        except Damaged:
            return None  # deleted since

    def _write(
        self, entries: Sequence[tuple[EntryKey, KV]], costs: Mapping[str, float], ttl_seconds: float | None
    ) -> None:
        """Write entries of different names; all their bytes are on the disk before any gets its name."""
        new: dict[str, Manifest] = {}

        def encoded() -> Iterator[NewEntry]:
            for key, kv in entries:
                now = self._clock.now()
                manifest, parts = layout.encode(
                    key,
                    kv,
                    now,
                    cost_seconds=costs[key.id],
                    expires=_end(now, ttl_seconds),
                    filters=self._folder.filters,
                )
                self._prepare(manifest)
                new[key.id] = manifest
                yield key.id, manifest, parts

        with self._folder.writing(encoded()) as commit, self._ledger.locked():
            # What is intact by now, another process has written.
            left = {key.id: new[key.id] for key, _ in entries if not self._loader.is_intact(key)}
            if any(self._limits.of(tenant_of(manifest)) for manifest in left.values()):
                for key_id, manifest in left.items():  # each may have to evict others
                    self._commit({key_id: manifest}, partial(commit, [key_id]))
            elif left:
                self._commit(left, partial(commit, list(left)))

    def _renew(self, key: EntryKey, cost_seconds: float, ttl_seconds: float | None) -> None:
        """Write another manifest for the same rows."""
        self._hits.flush()
        with self._ledger.locked():
            before, now = self._intact(key), self._clock.now()
            if before is None:
                return  # deleted since: as if that had been a moment later
            manifest = replace(
                before,
                cost_seconds=cost_seconds or before.cost_seconds,
                created=before.created if ttl_seconds is None else now,
                expires=_end(now, ttl_seconds),
            )
            if manifest != before:
                manifest = layout.resealed(manifest, self._folder.filters)
                self._commit({key.id: manifest}, lambda: self._folder.rewrite(key.id, manifest))

    def _commit(self, new: Mapping[str, Manifest], commit: Callable[[], None]) -> None:
        """Make room, then have the entries; the caller holds the lock. With limits, one at a time."""
        self._folder.filters.claim(self._folder.path)
        victims: list[Victim] = []
        for key_id, manifest in new.items():
            self._loader.kept.drop(key_id)
            victims += self._victims(tenant_of(manifest), key_id, size_of(manifest))
        floor = max((victim.priority for victim in victims), default=0.0)
        names = [*new, *(victim.id for victim in victims)]
        with self._ledger.changing(names, new, floor=floor):
            self._erase(victims)
            commit()

    def _victims(self, tenant: str, key_id: str, num_bytes: int) -> list[Victim]:
        """What has to go so that an entry fits; the caller holds the lock.

        Raises:
            StoreWriteError: it cannot fit, or nobody can tell.
            UploadsPending: it cannot fit yet.
        """
        if not self._limits.of(tenant):
            return []
        now = self._clock.now()
        found = self._ledger.ask(
            lambda index: self._limits.victims(index, tenant, key_id, num_bytes, now, self._folder.is_held)
        )
        if found is None:
            raise StoreWriteError(
                f"the index of {self._folder.path} cannot be written, and without it nobody can keep a "
                "budget: free some space on its disk, or open the store without budget_bytes and quotas"
            )
        return found

    def _erase(self, victims: Sequence[Victim]) -> None:
        for victim in victims:
            if self._folder.is_pinned(victim.id) or self._folder.is_held(victim.id):
                continue  # the index did not know; it will when this change ends
            self._loader.kept.drop(victim.id)
            self._counts.add("evicted_bytes", self._folder.erase(victim.id))
            self._counts.add("evictions")

    def _delete(self, key_id: str) -> Receipt:
        """Remove every trace of an entry; the caller holds the lock."""
        existed = self._folder.exists(key_id)
        erased, folders, num_bytes = [], set(), 0
        had_row = self._ledger.ask(lambda index: index.info(key_id)) is not None
        with self._ledger.changing([key_id]):
            for file in self._folder.erasable(key_id):
                num_bytes += file.stat().st_size
                file.unlink(missing_ok=True)
                erased.append(f"disk: {file.relative_to(self._folder.path)}")
                folders.add(file.parent)
            for folder in folders:
                sync_folder(folder)
        if had_row and self._ledger.ask(lambda index: index.info(key_id)) is None:
            erased.append("disk: index")
        return Receipt(key_id, existed, tuple(erased), num_bytes)


def tenant_of(manifest: Manifest) -> str:
    """The name space that an entry belongs to."""
    return str(manifest.fingerprint.get("tenant", ""))


def size_of(manifest: Manifest) -> int:
    """Bytes of an entry's two files."""
    return manifest.file_size + len(layout.dump_manifest(manifest))


def _end(now: float, ttl_seconds: float | None) -> float | None:
    return None if ttl_seconds is None else now + ttl_seconds

"""The store that lasts: one data file and one manifest per entry, mapped when they are read."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.segments import KV, LayerKV, LazyLayers
from kvrag.store import advice, layout
from kvrag.store.base import CheckReport, EntryInfo, Receipt, StoreStats, SweepReport, check_rows, check_times
from kvrag.store.clock import StoreClock
from kvrag.store.codec import codec_named
from kvrag.store.eviction import eviction_named
from kvrag.store.files import commit, make_folder, sync_folder, write_error
from kvrag.store.folder import EntryFolder, is_id
from kvrag.store.hits import Hits
from kvrag.store.index import Victim
from kvrag.store.kept import KeptEntries, Signature
from kvrag.store.key import EntryKey, token_bytes
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.lazy import MappedLayers
from kvrag.store.ledger import Ledger
from kvrag.store.room import Limits
from kvrag.store.upkeep import Upkeep

logger = logging.getLogger(__name__)

_MAX_READS = 3
_NO_EXPIRY = b'"expires":null'


class DiskStore:
    """A folder of entries, shared by any number of processes.

    An entry exists if and only if its manifest does. docs/store-format.md has the format, docs/store.md what
    a crash at each step leaves and who finds it.

    Names change under the store's lock file only, and files are never changed in place, so readers need
    no lock: what they have mapped stays as it was, also for a layer that is touched long after, and also when
    its entry is evicted. Cutting or overwriting a file of the store by other means while it is mapped is not
    protected against (the operating system raises SIGBUS).

    An index beside the files (`kvrag.store.index`) knows sizes, uses and ends, so that nothing but `ids`,
    `sweep`, `check` and `rebuild` takes longer the more entries there are. It is derived from the files;
    loads go by the files alone.

    Args:
        path: the folder; created by the first `put`.
        verify: "load" checks every byte whenever a file is newly mapped, or by layer every byte of a layer
            when it is first touched; "never" checks sizes, manifest and tokens only.
        keep_bytes: how many bytes of verified files stay mapped, to be handed out again without another
            check while the files are unchanged; 0 switches this off.
        budget_bytes: what all entries together may take; `put` evicts what is worth least until the new one
            fits. Not counted: files while they are being written, and quarantine. None: no limit.
        eviction: what is worth least, by name (`kvrag.store.eviction`). All who put into one folder should
            name the same: whoever evicts with another has all entries weighed anew.
        quotas: bytes by tenant, within the budget: a tenant that is full evicts entries of its own.
        ttl_seconds: time to live of entries that are put without one of their own; None: no end.
        wall_clock: seconds since 1970, for times to live (`kvrag.store.clock` says what happens if it jumps).

    Raises:
        ConfigError: a setting that cannot work.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        verify: Literal["load", "never"] = "load",
        keep_bytes: int = 4 << 30,
        budget_bytes: int | None = None,
        eviction: str = "gdsf",
        quotas: Mapping[str, int] | None = None,
        ttl_seconds: float | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if verify not in ("load", "never"):
            raise ConfigError(f"verify={verify!r}: expected 'load' or 'never'")
        eviction_named(eviction)  # refuses unknown names
        check_times(0.0, ttl_seconds)
        self.path = Path(path)
        self._verify = verify
        self._ttl_seconds = ttl_seconds
        self._limits = Limits(budget_bytes, dict(quotas or {}))
        self._clock = StoreClock(wall_clock)
        self._folder = EntryFolder(self.path)
        self._ledger = Ledger(self._folder, self._clock, eviction)
        self._hits = Hits(self._ledger, self._clock)
        self._upkeep = Upkeep(
            self._folder, self._ledger, self._clock, self._limits, self._evict, self._set_aside
        )
        self._kept = KeptEntries(keep_bytes)
        self._signature = self._folder.signature
        self._lost: dict[str, Signature] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Return the entry's rows: as views of its mapped file, or decoded where a codec wrote them.

        Rows are shared with other callers in this process: they must not be written to. (The mapping is
        copy-on-write, so not even that would reach the file.)

        Args:
            key: what to look for.
            by_layer: verify header and tokens now, and each layer when it is first touched: `layers` is a
                `LazyLayers` then, unless the entry is kept and proven already. Layers that were touched
                stay proven for later calls. See `KVStore.get`.

        Raises:
            CacheMiss: absent or expired, or damaged or foreign and then moved to `quarantine/` and counted.
        """
        for _ in range(_MAX_READS):
            signature = self._signature(key.id)
            if signature is None or self._lost.get(key.id) == signature:
                break
            try:
                kept = self._kept.get(key.id, signature)
                if kept is None or (isinstance(kept.kv.layers, LazyLayers) and not by_layer):
                    kv = self._load(key, signature, by_layer=by_layer)
                else:
                    kv = kept.kv
                    if kept.expires is not None:
                        self._check_time(key.id, kept.expires)
            except Damaged as damage:
                if self._signature(key.id) != signature:
                    continue  # it was being replaced while we read it
                self._set_aside(key.id, str(damage), signature)
                break
            self._count("hits")
            self._hits.count(key.id)
            return kv
        raise self._miss(key.id)

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Write the rows so that a crash after the return does not lose them.

        The rows of an intact entry under this key are left as they are: equal keys have equal rows. Its time
        to live and cost become the new ones.

        Raises:
            ConfigError: the rows are not of this key, or a time is none.
            StoreWriteError: nothing was written; the message says what to do. It may say that the entry
                does not fit into the budget.
        """
        check_rows(key, kv)
        ttl_seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
        check_times(cost_seconds, ttl_seconds)
        if not layout.is_storable(key.fingerprint.dtype):
            raise ConfigError(f"no file format for elements of type {key.fingerprint.dtype}")
        codec_named(key.fingerprint.codec)  # refuses unknown names
        try:
            if not self._is_intact(key):
                self._write(key, kv, cost_seconds, ttl_seconds)
            elif cost_seconds or ttl_seconds is not None or self._expires(key.id) is not None:
                self._renew(key, cost_seconds, ttl_seconds)
        except StoreWriteError:
            self._count("write_failures")
            raise
        except OSError as error:
            self._count("write_failures")
            raise write_error(error, self.path) from error

    def delete(self, key_id: str) -> Receipt:
        """Remove the entry, its bytes, its pin, and what quarantine or an interrupted write has of it.

        The medium may keep the blocks of removed files until it uses them again (docs/store.md).

        Raises:
            StoreWriteError: the files cannot be removed.
        """
        if not is_id(key_id):
            return Receipt(key_id, False)
        self._kept.drop(key_id)
        try:
            if not self._folder.traces(key_id):
                return Receipt(key_id, False)
            with self._ledger.locked():
                return self._delete(key_id)
        except OSError as error:
            raise write_error(error, self.path) from error

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id, its time to live not over; reads no rows."""
        key_id = key.id if isinstance(key, EntryKey) else key
        if not isinstance(key_id, str) or not is_id(key_id):
            return False
        try:
            raw = self._folder.files(key_id)[0].read_bytes()
            return _NO_EXPIRY in raw or not self._is_over(layout.parse_manifest(raw).expires)
        except FileNotFoundError:
            return False
        except (OSError, Damaged):
            return True  # there is an entry; `get` says what it is worth

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in no order; of the files, so also those that the index does not know."""
        return self._folder.ids()

    def entries(self, tenant: str | None = None) -> Iterator[EntryInfo]:
        """What is known of all entries, or those of one tenant, in the order of their ids.

        Entries may be deleted while they are listed; memory does not grow with their number.
        """
        self._hits.flush()
        page = self._ledger.page("", tenant)
        while page:
            yield from page
            page = self._ledger.page(page[-1].id, tenant)
        if page is None:  # there is no index: one manifest after another
            yield from (info for info in self._ledger.described() if tenant in (None, info.tenant))

    def info(self, key_id: str) -> EntryInfo | None:
        """What is known of one entry; None if there is none."""
        if not is_id(key_id) or not self._folder.exists(key_id):
            return None
        self._hits.flush()
        found = self._ledger.ask(lambda index: index.info(key_id))
        if found is None:
            with suppress(Damaged):
                found = self._ledger.describe(key_id)
        return found

    def pin(self, key_id: str, pinned: bool = True) -> bool:
        """Never evict the entry, or let go of it; false if there is none.

        A pin is a file beside the entry: it needs no index, and holds again when a damaged entry is mended.
        It does not keep an entry from expiring, nor from `delete`.

        Raises:
            StoreWriteError: the folder cannot be written.
        """
        if not is_id(key_id) or not self._folder.exists(key_id):
            return False
        try:
            with self._ledger.locked():
                if not self._folder.exists(key_id):
                    return False
                with self._ledger.changing([key_id]):
                    self._folder.pin(key_id, pinned)
        except OSError as error:
            raise write_error(error, self.path) from error
        return True

    def stats(self) -> StoreStats:
        """Counts since this object was made, and sizes on the disk; expired entries count until swept."""
        entries, num_bytes = self._ledger.sizes()
        counts = self._counts
        return StoreStats(
            entries=entries,
            num_bytes=num_bytes,
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=counts["damaged"],
            write_failures=counts["write_failures"],
            bytes_read=counts["bytes_read"],
            evictions=counts["evictions"],
            evicted_bytes=counts["evicted_bytes"],
            expired=counts["expired"],
        )

    def sweep(self, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> SweepReport:
        """Remove what expired, what crashes left, and what is beyond the budget; mend the index.

        Args:
            dry_run: change nothing, and say what would be removed.
            grace_seconds: where nobody can tell whether a partial file is being written (Windows, or while
                others write), how old it has to be.

        Raises:
            StoreWriteError: the folder is read-only, or a file cannot be removed.
        """
        if dry_run:
            return self._upkeep.preview(grace_seconds)
        self._hits.flush()
        try:
            return self._upkeep.sweep(grace_seconds)
        except OSError as error:
            raise write_error(error, self.path) from error

    def check(
        self,
        *,
        fix: bool = False,
        grace_seconds: float = 3600.0,
        progress: Callable[[int], None] | None = None,
    ) -> CheckReport:
        """Verify every byte of every entry, find files that belong to none, and compare the index.

        Args:
            fix: move damaged entries to `quarantine/`, remove orphans, mend the index.
            grace_seconds: as for `sweep`.
            progress: told the bytes of each entry once they are verified; may take its time.
        """
        return self._upkeep.check(fix=fix, grace_seconds=grace_seconds, progress=progress)

    def empty_quarantine(self, older_than_seconds: float, *, dry_run: bool = False) -> tuple[list[str], int]:
        """Remove damaged entries that were set aside longer ago than this; names of the files, and bytes.

        Raises:
            StoreWriteError: the folder is read-only.
        """
        try:
            return self._upkeep.empty_quarantine(older_than_seconds, dry_run=dry_run)
        except OSError as error:
            raise write_error(error, self.path) from error

    def rebuild(self) -> int:
        """Build the index from the files, at any time; the number of entries. Counts of loads are lost.

        Raises:
            StoreWriteError: the folder is read-only.
        """
        try:
            return self._ledger.rebuild()
        except OSError as error:
            raise write_error(error, self.path) from error

    def damage(self, key_id: str) -> str | None:
        """What is wrong with an entry's bytes, every one of them read; None if nothing is.

        Raises:
            CacheMiss: there is no such entry.
        """
        if not is_id(key_id) or not self._folder.exists(key_id):
            raise CacheMiss(f"no entry {key_id[:12]} in {self.path}")
        try:
            self._upkeep.verify(key_id)
        except Damaged as damage:
            return str(damage)
        return None

    def files_of(self, key_id: str) -> tuple[Path, Path]:
        """Where manifest and data file of an entry lie, or would.

        Raises:
            ConfigError: this is no name of an entry.
        """
        if not is_id(key_id):
            raise ConfigError(f"{key_id!r} is no name of an entry")
        return self._folder.files(key_id)

    def adopt(self, other: DiskStore, key_id: str) -> bool:
        """Move an entry over from another store in the same file system; false if it is here already.

        Raises:
            CacheMiss: the other store has no such entry.
            StoreWriteError: it does not fit into the budget, or the files cannot be moved.
        """
        (manifest_there, data_there), (manifest, data) = other.files_of(key_id), self.files_of(key_id)
        try:
            info = other._ledger.describe(key_id)
            if info is None:
                raise CacheMiss(f"no entry {key_id[:12]} in {other.path}")
            self._limits.check_size(info.tenant, info.num_bytes)
            make_folder(data.parent)
            with self._ledger.locked():
                if self._folder.exists(key_id):
                    return False
                victims = self._victims(info.tenant, key_id, info.num_bytes)
                with self._ledger.changing([key_id, *victims], floor=_highest(victims)):
                    self._erase(victims)
                    commit(data_there, data)
                    commit(manifest_there, manifest)
        except Damaged as damage:
            raise CacheMiss(f"the entry {key_id[:12]} in {other.path} is damaged: {damage}") from damage
        except OSError as error:
            raise error if isinstance(error, StoreWriteError) else write_error(error, self.path) from error
        return True

    def expire(self, key_id: str, ttl_seconds: float | None) -> bool:
        """Give an entry another time to live, from now on; None: no end. False if there is none.

        Raises:
            ConfigError: the time is none.
            StoreWriteError: the folder cannot be written.
        """
        check_times(0.0, ttl_seconds)
        if key_id not in self:
            return False
        try:
            with self._ledger.locked():
                before, now = self._folder.manifest(key_id), self._clock.now()
                manifest = replace(before, created=now, expires=_end(now, ttl_seconds))
                with self._ledger.changing([key_id], {key_id: manifest}):
                    self._folder.rewrite(key_id, manifest)
        except Damaged:
            return False
        except OSError as error:
            raise write_error(error, self.path) from error
        return True

    def close(self) -> None:
        """Forget the mappings; rows already handed out stay valid, and the store can be used again."""
        self._hits.flush()
        self._kept.clear()
        self._ledger.close()

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    def _miss(self, key_id: str) -> CacheMiss:
        """Forget and count an entry that is not usable; the error to raise."""
        self._kept.drop(key_id)
        self._count("misses")
        return CacheMiss(f"no usable entry {key_id[:12]} in {self.path}")

    def _expires(self, key_id: str) -> float | None:
        """Until when an entry may be handed out; None: no end, or there is none."""
        try:
            return self._folder.manifest(key_id).expires
        except Damaged:
            return None

    def _is_over(self, expires: float | None) -> bool:
        return expires is not None and expires <= self._clock.now()

    def _check_time(self, key_id: str, expires: float | None, made: float = 0.0) -> None:
        """Refuse an entry whose time to live is over.

        Raises:
            CacheMiss: it is.
        """
        if expires is not None and expires <= self._clock.at_least(made):
            self._count("expired")
            raise self._miss(key_id)

    def _load(self, key: EntryKey, signature: Signature, *, by_layer: bool = False) -> KV:
        """Map, verify and remember an entry; by layer only what lies around the rows is verified.

        Raises:
            Damaged: it is not what its manifest and this key say.
            CacheMiss: its time to live is over.
        """
        manifest = self._folder.manifest(key.id)
        fields = key.fingerprint.fields()
        if manifest.fingerprint != fields:
            other = {name: manifest.fingerprint.get(name) for name, v in fields.items()}
            raise Damaged(f"the entry was made for {other}, asked for was {fields}")
        self._check_time(key.id, manifest.expires, manifest.created)
        data = layout.map_file(self._folder.files(key.id)[1], manifest)
        if by_layer:
            advice.read_nothing_ahead(data)
        if self._verify == "load":
            (layout.verify_frame if by_layer else layout.verify)(data, manifest)
        if layout.stored_tokens(data, manifest) != token_bytes(key.tokens):
            raise Damaged("the entry holds other tokens")
        layer = layout.reader(data, manifest, key)
        if by_layer:
            kv = self._by_layer(key, signature, data, manifest, layer)
        else:
            kv = KV(key.tokens, tuple(map(layer, range(len(manifest.layers)))))
            self._count("bytes_read", sum(end - start for start, end in manifest.layer_spans()))
        self._keep(key.id, signature, manifest, kv)
        return kv

    def _by_layer(
        self,
        key: EntryKey,
        signature: Signature,
        data: torch.Tensor,
        manifest: Manifest,
        layer: Callable[[int], LayerKV],
    ) -> KV:
        """The same rows, each layer verified, decoded and counted when it is first touched."""
        spans = list(manifest.layer_spans())

        def prove(number: int) -> LayerKV:
            start, end = spans[number]
            advice.read_soon(data, start, end)
            try:
                if self._verify == "load":
                    layout.verify_layer(data, manifest, number, (start, end))
            except Damaged as damage:
                self._lose(key.id, signature, damage)
                raise self._miss(key.id) from damage
            self._count("bytes_read", end - start)
            return layer(number)

        def finish() -> None:
            whole = KV(key.tokens, tuple(layers))
            self._keep(key.id, signature, manifest, whole)  # from now on like one loaded at once

        layers = MappedLayers(len(key.tokens), manifest.row_bytes(), prove, finish)
        return KV(key.tokens, layers)

    def _keep(self, key_id: str, signature: Signature, manifest: Manifest, kv: KV) -> None:
        if self._signature(key_id) == signature:
            size = max(manifest.file_size, sum(manifest.row_bytes()))
            self._kept.keep(key_id, signature, kv, size, manifest.expires)

    def _lose(self, key_id: str, signature: Signature, damage: Damaged) -> None:
        """Set an entry aside that was handed out before, unless other files have taken its place."""
        if self._signature(key_id) != signature or self._lost.get(key_id) == signature:
            return
        self._set_aside(key_id, str(damage), signature)
        if self._signature(key_id) == signature:
            # A read-only store. Its header is intact: without this, who starts over would find it again.
            self._lost[key_id] = signature

    def _is_intact(self, key: EntryKey) -> bool:
        signature = self._signature(key.id)
        if signature is None:
            return False
        try:
            self._load(key, signature)
        except Damaged:
            return False
        return True

    def _write(self, key: EntryKey, kv: KV, cost_seconds: float, ttl_seconds: float | None) -> None:
        now = self._clock.now()
        manifest, parts = layout.encode(key.fingerprint, kv, now)
        manifest = replace(manifest, cost_seconds=cost_seconds, expires=_end(now, ttl_seconds))
        tenant, num_bytes = key.fingerprint.tenant, manifest.file_size + len(layout.dump_manifest(manifest))
        self._limits.check_size(tenant, num_bytes)
        with self._folder.writing(key.id, manifest, parts) as commit, self._ledger.locked():
            if self._is_intact(key):
                return  # another process was faster
            self._kept.drop(key.id)
            victims = self._victims(tenant, key.id, num_bytes)
            with self._ledger.changing([key.id, *victims], {key.id: manifest}, floor=_highest(victims)):
                self._erase(victims)
                commit()

    def _renew(self, key: EntryKey, cost_seconds: float, ttl_seconds: float | None) -> None:
        """Write another manifest for the same rows."""
        with self._ledger.locked():
            if not self._is_intact(key):
                return  # deleted or damaged since: a miss, as if it had been so before
            before, now = self._folder.manifest(key.id), self._clock.now()
            manifest = replace(
                before,
                cost_seconds=cost_seconds or before.cost_seconds,
                created=now if ttl_seconds is not None else before.created,
                expires=_end(now, ttl_seconds),
            )
            if manifest != before:
                with self._ledger.changing([key.id], {key.id: manifest}):
                    self._folder.rewrite(key.id, manifest)

    def _victims(self, tenant: str, key_id: str, num_bytes: int) -> dict[str, Victim]:
        """What has to go so that an entry fits; the caller holds the lock.

        Raises:
            StoreWriteError: it cannot fit, or nobody can tell.
        """
        if not self._limits.of(tenant):
            return {}
        self._hits.flush()
        now = self._clock.now()
        found = self._ledger.ask(lambda index: self._limits.victims(index, tenant, key_id, num_bytes, now))
        if found is None:
            raise StoreWriteError(
                f"the index of {self.path} cannot be written, and without it nobody can keep a budget: "
                "free some space on its disk, or open the store without budget_bytes and quotas"
            )
        return {victim.id: victim for victim in found}

    def _evict(self, victims: Sequence[Victim]) -> None:
        """Erase entries that are too many; the caller holds the lock."""
        chosen = {victim.id: victim for victim in victims}
        with self._ledger.changing(list(chosen), floor=_highest(chosen)):
            self._erase(chosen)

    def _erase(self, victims: Mapping[str, Victim]) -> None:
        for key_id in victims:
            if self._folder.is_pinned(key_id):
                continue  # the index did not know; it does from now on
            self._kept.drop(key_id)
            self._count("evicted_bytes", self._folder.erase(key_id))
            self._count("evictions")

    def _delete(self, key_id: str) -> Receipt:
        """Remove every trace of an entry; the caller holds the lock."""
        existed = self._folder.exists(key_id)
        erased, num_bytes = [], 0
        had_row = self._ledger.ask(lambda index: index.info(key_id)) is not None
        with self._ledger.changing([key_id]):
            for file in self._folder.erasable(key_id):
                num_bytes += file.stat().st_size
                file.unlink()
                erased.append(f"disk: {file.relative_to(self.path)}")
            if erased:
                sync_folder(self._folder.files(key_id)[0].parent)
        if had_row and self._ledger.ask(lambda index: index.info(key_id)) is None:
            erased.append("disk: index")
        return Receipt(key_id, existed, tuple(erased), num_bytes)

    def _set_aside(self, key_id: str, reason: str, signature: Signature) -> None:
        """Move a damaged entry out of the way, for a person to look at; the manifest first."""
        self._count("damaged")
        logger.warning(
            "entry %s in %s is not usable and will be recomputed: %s", key_id[:12], self.path, reason
        )
        try:
            with self._ledger.locked():
                if self._signature(key_id) == signature:  # else somebody has mended it meanwhile
                    with self._ledger.changing([key_id]):
                        self._folder.set_aside(key_id)
        except OSError as error:
            logger.warning("it could not be moved aside: %s", error)


def _end(now: float, ttl_seconds: float | None) -> float | None:
    return None if ttl_seconds is None else now + ttl_seconds


def _highest(victims: Mapping[str, Victim]) -> float:
    return max((victim.priority for victim in victims.values()), default=0.0)

"""The store that lasts: one data file and one manifest per entry, mapped when they are read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from kvrag.errors import ConfigError
from kvrag.segments import KV
from kvrag.store import layout
from kvrag.store.base import (
    Receipt,
    StoreStats,
    check_rows,
    check_times,
    costs_of,
)
from kvrag.store.clock import StoreClock
from kvrag.store.codec import codec_named
from kvrag.store.counts import Counts
from kvrag.store.eviction import eviction_named
from kvrag.store.exchange import Exchange
from kvrag.store.filters import Filters
from kvrag.store.folder import EntryFolder, is_id
from kvrag.store.found import Found, Place
from kvrag.store.hits import Hits
from kvrag.store.kept_folder import KeptFolder
from kvrag.store.key import EntryKey
from kvrag.store.layout import Damaged
from kvrag.store.ledger import Ledger
from kvrag.store.loading import Loader
from kvrag.store.room import Limits
from kvrag.store.sealing import MasterKey
from kvrag.store.upkeep import Upkeep
from kvrag.store.writing import Writer

_NO_EXPIRY = b'"expires":null'


class DiskStore(KeptFolder):
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
        compress: "zstd" makes files of new entries smaller without changing a row, for slow disks and links;
            they are no longer attended to where they lie. Entries are read whatever is said here.
        key: 32 bytes (`kvrag.keys`): everything is encrypted. A store is encrypted as a whole or not at all,
            as its first entry was; without its key it can be listed, verified and deleted from.
        direct: read whole entries past the page cache into memory of the process, where the file system can
            (`kvrag.store.direct` says when that pays); `keep_bytes` is memory then.
        ttl_seconds: time to live of entries that are put without one of their own; None: no end.
        wall_clock: seconds since 1970, for times to live (`kvrag.store.clock` says what happens if it jumps).

    Raises:
        ConfigError: a setting that cannot work, or not the key that the folder is encrypted with.
        MissingExtra: compression and encryption need extras, `kvrag[compress]` and `kvrag[encrypt]`.
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
        compress: Literal["zstd"] | None = None,
        key: bytes | None = None,
        direct: bool = False,
        ttl_seconds: float | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if verify not in ("load", "never"):
            raise ConfigError(f"verify={verify!r}: expected 'load' or 'never'")
        eviction_named(eviction)  # refuses unknown names
        check_times(0.0, ttl_seconds)
        self.path = Path(path)
        self._ttl_seconds = ttl_seconds
        self._limits = Limits(budget_bytes, dict(quotas or {}))
        self._clock = StoreClock(wall_clock)
        self._folder = EntryFolder(self.path, Filters(compress, key))
        self._ledger = Ledger(self._folder, self._clock, eviction)
        self._hits = Hits(self._ledger, self._clock)
        self._counts = Counts()
        around = (self._folder, self._ledger, self._clock)
        self._loader = Loader(*around, self._counts, verify=verify, keep_bytes=keep_bytes, direct=direct)
        self._writer = Writer(*around, self._limits, self._hits, self._loader, self._counts)
        self._exchange = Exchange(self._folder, self._ledger, self._writer)
        self._upkeep = Upkeep(*around, self._limits, self._writer.evict, self._loader.set_aside)

    @property
    def is_encrypted(self) -> bool:
        """Whether its entries are, or will be once there are some."""
        return self._folder.filters.look_at(self.path)

    @property
    def master_key(self) -> MasterKey | None:
        """What its entries are encrypted with, for what else belongs to them; None: they are not.

        Raises:
            ConfigError: they are, with another key or without one given here.
        """
        return self._folder.filters.key_for(self.path)

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
        return self.find(key, by_layer=by_layer).kv

    def find(self, key: EntryKey, *, by_layer: bool = False) -> Found:
        """The same as `get`, and whether the rows were verified and mapped before; see `Finds`."""
        found = self._loader.find(key, by_layer=by_layer)
        self._hits.count(key.id)
        return found

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Where rows may have to be read from; see `Place.tier`."""
        return (self._loader.name,)

    def locate(self, key: EntryKey) -> Place | None:
        """Where the entry would be taken from; see `Locates`."""
        return self._loader.locate(key.id)

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
        self.put_many([(key, kv)], cost_seconds=cost_seconds, ttl_seconds=ttl_seconds)

    def put_many(
        self,
        entries: Sequence[tuple[EntryKey, KV]],
        *,
        cost_seconds: float | Sequence[float] = 0.0,
        ttl_seconds: float | None = None,
    ) -> None:
        """Write the rows of many texts so that a crash after the return loses none of them.

        The same as `put` for each, in about the time that the disk takes for the bytes: files are synced
        together instead of one after the other, in groups of 64 entries. A crash before the return may leave
        some of the entries.

        Args:
            entries: keys and their rows; a key that comes twice is written once.
            cost_seconds: see `KVStore.put`; of each, or one for each.
            ttl_seconds: see `KVStore.put`; of each.

        Raises:
            ConfigError: the rows are not of their key, or a time is none; nothing was written.
            StoreWriteError: some were not written; the message says what to do.
        """
        ttl_seconds = self._ttl_seconds if ttl_seconds is None else ttl_seconds
        costs = costs_of(entries, cost_seconds)
        for (key, kv), cost in zip(entries, costs, strict=True):
            check_times(cost, ttl_seconds)
            check_rows(key, kv)
            if not layout.is_storable(key.fingerprint.dtype):
                raise ConfigError(f"no file format for elements of type {key.fingerprint.dtype}")
            codec_named(key.fingerprint.codec)  # refuses unknown names
        with self._writing():
            self._writer.put(
                entries, {key.id: cost for (key, _), cost in zip(entries, costs, strict=True)}, ttl_seconds
            )

    def expire(self, key_id: str, ttl_seconds: float | None) -> bool:
        """Give an entry another time to live, from now on; None: no end. False if there is none.

        Raises:
            ConfigError: the time is none, or the entry is encrypted and the store was opened without a key.
            StoreWriteError: the folder cannot be written.
        """
        check_times(0.0, ttl_seconds)
        if key_id not in self:
            return False
        with self._writing():
            return self._writer.expire(key_id, ttl_seconds)

    def delete(self, key_id: str) -> Receipt:
        """Remove the entry, its bytes, its pin, and what quarantine or an interrupted write has of it.

        The medium may keep the blocks of removed files until it uses them again (docs/store.md).

        Raises:
            StoreWriteError: the files cannot be removed.
        """
        if not is_id(key_id):
            return Receipt(key_id, False)
        with self._writing():
            return self._writer.delete(key_id)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id, its time to live not over; reads no rows."""
        key_id = key.id if isinstance(key, EntryKey) else key
        if not isinstance(key_id, str) or not is_id(key_id):
            return False
        try:
            raw = self._folder.files(key_id)[0].read_bytes()
            return _NO_EXPIRY in raw or not self._loader.is_over(layout.parse_manifest(raw))
        except (FileNotFoundError, NotADirectoryError):  # the latter: the store's path is a file
            return False
        except (OSError, Damaged):
            return True  # there is an entry; `get` says what it is worth

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in no order; of the files, so also those that the index does not know."""
        return self._folder.ids()

    def stats(self) -> StoreStats:
        """Counts since this object was made, and sizes on the disk; expired entries count until swept."""
        entries, num_bytes = self._ledger.sizes()
        counts = self._counts
        return StoreStats(
            entries=entries,
            num_bytes=num_bytes,
            hits=self._hits.total,
            misses=counts["misses"],
            damaged=counts["damaged"],
            write_failures=counts["write_failures"],
            bytes_read=counts["bytes_read"],
            evictions=counts["evictions"],
            evicted_bytes=counts["evicted_bytes"],
            expired=counts["expired"],
        )

    def close(self) -> None:
        """Forget the mappings; rows already handed out stay valid, and the store can be used again."""
        self._hits.flush()
        self._loader.kept.clear()
        self._ledger.close()

"""Rows in memory: the naive store, which judges the others, and a tier with a budget, on any device."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from kvrag.errors import CacheMiss, ConfigError, StoreWriteError
from kvrag.segments import KV, LayerKV
from kvrag.store.base import CheckReport, EntryInfo, Receipt, StoreStats, check_rows, check_times
from kvrag.store.eviction import eviction_named
from kvrag.store.found import Found, Place, at_hand
from kvrag.store.held import Held, HeldEntries
from kvrag.store.key import EntryKey


class MemoryStore:
    """Keeps rows in this process; for tests, trials and texts that need not outlive it."""

    name = "memory"
    tier_names: tuple[str, ...] = ()  # nothing has to be read

    def __init__(self) -> None:
        self._entries: dict[str, KV] = {}
        self._ends: dict[str, float] = {}  # by the clock that never jumps
        self._lock = threading.Lock()
        self._hits = 0
        self._misses = 0

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Return the rows that were put, all at once; see `KVStore.get`."""
        with self._lock:
            if self._ends.get(key.id, math.inf) <= time.monotonic():
                self._forget(key.id)
            kv = self._entries.get(key.id)
            if kv is None:
                self._misses += 1
                raise CacheMiss(f"no entry {key.id[:12]} in memory")
            self._hits += 1
            return kv

    def find(self, key: EntryKey, *, by_layer: bool = False) -> Found:
        """The same as `get`: nothing has to be read; see `Finds`."""
        return at_hand(self.get(key), self.name)

    def locate(self, key: EntryKey) -> Place | None:
        """Where the entry is; see `Locates`."""
        return Place(self.name, is_at_hand=True) if key in self else None

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Keep the rows themselves, not a copy: they must not change afterwards. Nothing is ever evicted."""
        check_rows(key, kv)
        with self._lock:
            self._entries[key.id] = kv
            self._ends.pop(key.id, None)
            if ttl_seconds is not None:
                self._ends[key.id] = time.monotonic() + ttl_seconds

    def delete(self, key_id: str) -> Receipt:
        """Forget the entry."""
        with self._lock:
            kv = self._forget(key_id)
        return Receipt(key_id, False) if kv is None else Receipt(key_id, True, ("memory",), kv.num_bytes)

    def _forget(self, key_id: str) -> KV | None:
        self._ends.pop(key_id, None)
        return self._entries.pop(key_id, None)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id."""
        return (key.id if isinstance(key, EntryKey) else key) in self._entries

    def ids(self) -> Iterator[str]:
        """Ids of all entries at the time of the call."""
        with self._lock:
            return iter(list(self._entries))

    def stats(self) -> StoreStats:
        """Counts and sizes; memory neither decays nor refuses to be written."""
        with self._lock:
            num_bytes = sum(kv.num_bytes for kv in self._entries.values())
            return StoreStats(
                entries=len(self._entries),
                num_bytes=num_bytes,
                hits=self._hits,
                misses=self._misses,
                damaged=0,
                write_failures=0,
                bytes_read=0,
            )

    def check(self, *, fix: bool = False) -> CheckReport:
        """Nothing can be wrong here."""
        return CheckReport(fixed=fix)

    def close(self) -> None:
        """Nothing to release; the entries go with the object."""


class MemoryTier:
    """Keeps copies of rows on a device or in host memory, up to a number of bytes.

    On a GPU it stands for the copy that every request would make of the same rows. In host memory it is for
    rows that come from afar: a mapped file is memory already, and `TieredStore` copies none into it.

    Args:
        budget_bytes: of rows that are held; never exceeded, also not while an entry is being added. Rows that
            callers still hold when their entry is evicted are freed when they let go of them.
        eviction: who goes first when it is full, see `kvrag.store.eviction`.
        device: where rows are kept; None: in main memory.
        pinned: keep them in page-locked main memory, from which a GPU copies faster; ordinary memory where
            there is no GPU.
        quotas: most bytes by tenant, within the budget.

    Raises:
        ConfigError: no such policy, or a budget or quota below zero.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        eviction: str = "gdsf",
        device: torch.device | str | None = None,
        pinned: bool = False,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        if budget_bytes < 0 or any(quota < 0 for quota in (quotas or {}).values()):
            raise ConfigError(f"budget_bytes={budget_bytes}, quotas={quotas}: expected numbers of bytes")
        self.device = torch.device(device or "cpu")
        self.budget_bytes = budget_bytes
        self._pinned = pinned and self.device.type == "cpu" and torch.cuda.is_available()
        self._held = HeldEntries(budget_bytes, quotas or {}, eviction_named(eviction))
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """What receipts and counts call it."""
        return "memory" if self.device.type == "cpu" else f"memory of {self.device}"

    @property
    def tier_names(self) -> tuple[str, ...]:
        """None: nothing has to be read."""
        return ()

    @property
    def is_faster_than_a_mapping(self) -> bool:
        """Whether a copy here saves anything to who could have the same rows in a mapped file."""
        return self._pinned or self.device.type != "cpu"

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Return the rows where they are kept, all at once; see `KVStore.get`."""
        with self._lock:
            held = self._live(key.id)
            if held is None:
                self._counts["misses"] += 1
                raise CacheMiss(f"no entry {key.id[:12]} in {self.name}")
            self._counts["hits"] += 1
            self._held.use(key.id, is_hit=True)
            return held.kv

    def find(self, key: EntryKey, *, by_layer: bool = False) -> Found:
        """The same as `get`: nothing has to be read; see `Finds`."""
        return at_hand(self.get(key), self.name)

    def locate(self, key: EntryKey) -> Place | None:
        """Where the entry is; see `Locates`."""
        return Place(self.name, is_at_hand=True) if key in self else None

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Keep a copy of the rows, at the expense of others.

        Raises:
            ConfigError: the rows are not of this key.
            StoreWriteError: they are larger than the budget, or than what pinned entries leave of it.
            CacheMiss: the rows are read when they are touched, and are damaged.
        """
        if self.keep(key, kv, cost_seconds=cost_seconds, ttl_seconds=ttl_seconds) is None:
            self._counts["write_failures"] += 1
            raise StoreWriteError(
                errno.ENOSPC,
                f"{kv.num_bytes} bytes do not fit into {self.name}: its budget is {self.budget_bytes} bytes, "
                "less what is pinned; raise it, or unpin entries",
            )

    def keep(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> KV | None:
        """The same, but returns the rows where they are kept now, or None if there is no room for them."""
        check_rows(key, kv)
        check_times(cost_seconds, ttl_seconds)
        tenant, num_bytes, now = key.fingerprint.tenant, kv.num_bytes, time.time()
        ends = math.inf if ttl_seconds is None else time.monotonic() + ttl_seconds
        expires = None if ttl_seconds is None else now + ttl_seconds
        with self._lock:
            held = self._live(key.id)
            if held is not None:  # equal keys have equal rows
                held.ends, held.expires = ends, expires
                held.cost_seconds = cost_seconds or held.cost_seconds
                self._held.use(key.id)
                return held.kv
            if not self._held.reserve(tenant, num_bytes):
                return None
        try:
            placed = self._copy(kv)
        except BaseException:
            with self._lock:
                self._held.release(tenant, num_bytes)
            raise
        with self._lock:
            self._held.remove(key.id)  # another thread was faster; its copy is as good
            self._held.add(key.id, Held(placed, num_bytes, tenant, cost_seconds, now, expires, ends))
        return placed

    def delete(self, key_id: str) -> Receipt:
        """Forget the entry."""
        with self._lock:
            held = self._held.remove(key_id)
        return Receipt(key_id, False) if held is None else Receipt(key_id, True, (self.name,), held.num_bytes)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id."""
        key_id = key.id if isinstance(key, EntryKey) else key
        with self._lock:
            return isinstance(key_id, str) and self._live(key_id) is not None

    def ids(self) -> Iterator[str]:
        """Ids of all entries at the time of the call."""
        with self._lock:
            return iter(list(self._held.entries))

    def entries(self) -> Iterator[EntryInfo]:
        """What is known of every entry at the time of the call."""
        with self._lock:
            return iter([_info(key_id, held) for key_id, held in self._held.entries.items()])

    def info(self, key_id: str) -> EntryInfo | None:
        """What is known of an entry; None if there is none."""
        with self._lock:
            held = self._live(key_id)
            return None if held is None else _info(key_id, held)

    def pin(self, key_id: str, pinned: bool = True) -> bool:
        """Never evict an entry, or do so again; False if there is none."""
        with self._lock:
            if self._live(key_id) is None:
                return False
            self._held.pin(key_id, pinned)
            return True

    def stats(self) -> StoreStats:
        """Counts and sizes; memory does not decay."""
        with self._lock:
            return StoreStats(
                entries=len(self._held.entries),
                num_bytes=sum(held.num_bytes for held in self._held.entries.values()),
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                damaged=0,
                write_failures=self._counts["write_failures"],
                bytes_read=0,
                evictions=self._held.evictions,
                evicted_bytes=self._held.evicted_bytes,
            )

    def counts(self) -> dict[str, int]:
        """What has happened since this was made; see `Counting`."""
        with self._lock:
            return {
                "write_failures": self._counts["write_failures"],
                "evictions": self._held.evictions,
                "evicted_bytes": self._held.evicted_bytes,
            }

    def check(self, *, fix: bool = False) -> CheckReport:
        """Nothing can be wrong here."""
        return CheckReport(fixed=fix)

    def close(self) -> None:
        """Let go of all rows; the object can be used again."""
        with self._lock:
            for key_id in list(self._held.entries):
                self._held.remove(key_id)

    def _live(self, key_id: str) -> Held | None:
        held = self._held.entries.get(key_id)
        if held is not None and held.ends <= time.monotonic():
            self._held.remove(key_id)
            return None
        return held

    def _copy(self, kv: KV) -> KV:
        """The rows in memory of this tier's own: views would keep whatever they are views of."""
        return KV(kv.tokens, tuple(LayerKV(self._own(x.keys), self._own(x.values)) for x in kv.layers))

    def _own(self, rows: torch.Tensor) -> torch.Tensor:
        own = torch.empty(rows.shape, dtype=rows.dtype, device=self.device, pin_memory=self._pinned)
        return own.copy_(rows)


def _info(key_id: str, held: Held) -> EntryInfo:
    return EntryInfo(
        key_id,
        held.tenant,
        held.num_bytes,
        held.kv.num_tokens,
        held.created,
        held.hits,
        held.cost_seconds,
        held.expires,
        held.pinned,
    )

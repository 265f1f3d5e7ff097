"""What a store of prebuilt caches is; `memory.py` is the naive one, `disk.py` the one that lasts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvrag.errors import ConfigError
from kvrag.segments import KV
from kvrag.store.key import EntryKey

_MAX_SECONDS = 1e11
"""Three thousand years: longer times to live are mistakes, and would not fit a manifest."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the store was opened, and what it holds now.

    Attributes:
        entries: usable entries.
        num_bytes: bytes of those entries.
        hits: loads that returned rows; by layer also those of which a layer was found damaged later.
        misses: loads that did not, damaged entries included, also those found damaged later.
        damaged: entries set aside because a check failed.
        write_failures: entries that could not be written.
        bytes_read: bytes of rows that loads have read from files; rows that were kept are not read again,
            layers that nobody touched are never read.
        evictions: entries that this object has erased to make room.
        evicted_bytes: bytes of those.
        expired: misses, among those above, of entries whose time to live was over.
    """

    entries: int
    num_bytes: int
    hits: int
    misses: int
    damaged: int
    write_failures: int
    bytes_read: int
    evictions: int = 0
    evicted_bytes: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found: ids or file names, and whether they were mended.

    Attributes:
        damaged: ids of entries that are not what they have to be.
        orphans: files of no entry.
        index: ids whose row in the store's index is missing, one too many, or says other things than the
            files; "totals" if its sums are wrong.
        fixed: all of it was mended.
    """

    damaged: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    index: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def ok(self) -> bool:
        """Nothing was wrong."""
        return not (self.damaged or self.orphans or self.index)


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What `sweep` did.

    Attributes:
        expired: ids of entries whose time to live was over.
        orphans: files of no entry that were removed, by their name within the store.
        quarantined: files of damaged entries beyond the last few, removed too.
        damaged: ids of entries without their data, or with a manifest that is none; set aside.
        evicted: ids of entries that went to keep the budget.
        adopted: ids that the index did not know of.
        forgotten: ids that only the index knew of.
        num_bytes: bytes of all that was removed.
    """

    expired: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()
    adopted: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a deletion erased; true if there was an entry.

    Attributes:
        key_id: of the entry.
        existed: a usable entry was there.
        erased: every place that held bytes of it and does no more, such as "memory", "disk: data",
            "disk: quarantine", "objects: s3://bucket/ab/...".
        num_bytes: bytes that these places held.
    """

    key_id: str
    existed: bool
    erased: tuple[str, ...] = ()
    num_bytes: int = 0

    def __bool__(self) -> bool:
        """Whether there was an entry."""
        return self.existed


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """What a store knows of an entry without reading its rows.

    Attributes:
        id: of the entry.
        tenant: name space it belongs to; "" where there are none.
        num_bytes: on the disk, or wherever the store keeps it.
        num_tokens: length of the text.
        created: seconds since 1970.
        hits: loads so far.
        cost_seconds: what reading the text anew took; 0 if unknown.
        expires: seconds since 1970 after which it is a miss; None: never.
        pinned: it is never evicted.
    """

    id: str
    tenant: str
    num_bytes: int
    num_tokens: int
    created: float
    hits: int
    cost_seconds: float
    expires: float | None
    pinned: bool


class KVStore(Protocol):
    """Keeps texts' keys and values by content.

    `get` never returns rows of another text, model, tokenizer, dtype, prefix, layout or tenant:
    whatever cannot be proven right is a `CacheMiss`. Rows returned stay valid while the caller holds
    them, also when the entry is deleted meanwhile. All methods may be called from any thread.
    """

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Return the entry's rows; may share memory with the store, so they must not be written to.

        Args:
            key: what to look for.
            by_layer: read and verify a layer when it is first touched, instead of all at once; layers that
                nobody touches are never read. A damaged layer is a `CacheMiss` when it is touched, and the
                caller has to start over: the next `get` is a miss too. Stores that have nothing to read
                take no notice of it.

        Raises:
            CacheMiss: absent, damaged (then set aside and counted) or not of this key.
        """
        ...

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Keep the rows; after it returns, a crash does not lose them. Replacing equal content is allowed.

        Args:
            key: what the rows are.
            kv: the rows.
            cost_seconds: what reading the text took, for eviction; 0: unknown.
            ttl_seconds: time to live, after which the entry is a miss and may be removed; None: no end.

        Raises:
            StoreWriteError: nothing was written, and what was there before is still there.
        """
        ...

    def delete(self, key_id: str) -> Receipt:
        """Remove the entry and its bytes wherever they are; the receipt is false if there was none."""
        ...

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id; does not verify its bytes."""
        ...

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in no order."""
        ...

    def stats(self) -> StoreStats:
        """Counts and sizes."""
        ...

    def check(self, *, fix: bool = False) -> CheckReport:
        """Verify every entry's bytes and find files that belong to none.

        Args:
            fix: set damaged entries aside and remove orphans.
        """
        ...

    def close(self) -> None:
        """Release mappings and handles; entries stay."""
        ...


def check_rows(key: EntryKey, kv: KV) -> None:
    """Refuse rows that are not of this key; every store calls it first in `put`.

    Raises:
        ConfigError: other tokens, another dtype, or a layer whose shapes do not fit the tokens.
    """
    if kv.tokens != key.tokens or not kv.tokens:
        raise ConfigError(
            f"rows of {kv.num_tokens} tokens under a key of {len(key.tokens)}: not the same tokens"
        )
    expected = f"torch.{key.fingerprint.dtype}"
    for number, layer in enumerate(kv.layers):
        for rows in (layer.keys, layer.values):
            if str(rows.dtype) != expected:
                raise ConfigError(f"layer {number} is {rows.dtype}, its fingerprint says {expected}")
            if rows.ndim != 3 or rows.shape[:2] != (layer.keys.shape[0], kv.num_tokens):
                raise ConfigError(
                    f"layer {number} has shape {tuple(rows.shape)}, expected [heads, {kv.num_tokens}, size]"
                )


def check_times(cost_seconds: float, ttl_seconds: float | None) -> None:
    """Refuse times that are none; every store calls it first in `put`.

    Raises:
        ConfigError: negative, infinite or not a number; a time to live of nothing.
    """
    if not (math.isfinite(cost_seconds) and cost_seconds >= 0):
        raise ConfigError(f"cost_seconds={cost_seconds}: expected the seconds that reading took, or 0")
    if ttl_seconds is not None and not 0 < ttl_seconds < _MAX_SECONDS:
        raise ConfigError(
            f"ttl_seconds={ttl_seconds}: expected a number of seconds above 0, or None for no end"
        )

"""The store that is shared: one object per entry in a bucket, or in a folder that many machines see."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

from kvrag.errors import CacheMiss, ConfigError, EntryTooLarge, MissingExtra, StoreError
from kvrag.segments import KV
from kvrag.store import layout
from kvrag.store.base import CheckReport, Receipt, StoreStats, check_rows, check_times
from kvrag.store.bucket import Bucket, Object, in_words, is_refusal
from kvrag.store.bucket_room import BucketRoom, Listed
from kvrag.store.bucket_trouble import BucketTrouble
from kvrag.store.codec import codec_named
from kvrag.store.fetching import Fetching
from kvrag.store.files import PARTIAL
from kvrag.store.filters import Filters
from kvrag.store.found import Place
from kvrag.store.key import EntryKey
from kvrag.store.layout import Damaged
from kvrag.store.moving import HEADER_BYTES, EntryBytes, Frame, in_one_piece
from kvrag.store.opened import OpenedObject, entry_of, object_name
from kvrag.store.sealing import MasterKey

logger = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{64}")


class ObjectStore:
    """Entries as objects `<id[:2]>/<id>.kvrag`: frame, manifest, data; an upload is an entry.

    Reading takes one request for what lies before the rows, one for the tokens and one per layer, or two for
    the whole. Whatever goes wrong in reading is a miss with a warning; whatever goes wrong in writing raises
    `StoreWriteError`. Trying again is the file system library's part.

    Rows handed out by layer are fetched when they are touched. If the entry is deleted through this object
    meanwhile, they are fetched before; if somebody else deletes it, touching one is a miss.

    Args:
        url: such as s3://bucket/prefix, file:///mnt/shared/caches or memory://name; others than local files
            and memory need fsspec's package for them (s3fs, gcsfs, ...).
        verify: "load" checks every byte that is fetched; "never" checks sizes, manifest and tokens only.
        compress: "zstd" for entries that are put here; see `DiskStore`.
        master_key: 32 bytes: entries are encrypted before they leave this process, and no others are read. A
            disk tier above needs the same as its `key`, so that entries can move between them as they are.
        budget_bytes: what all entries may take; what was unused for longest goes then
            (`kvrag.store.bucket_room` says what is known of that). None: the bucket's matter.
        options: for the file system, such as `key`, `secret`, `endpoint_url`.

    Raises:
        ConfigError: fsspec cannot open the URL, or a setting cannot work.
        MissingExtra: fsspec, its package for S3, or what compresses or encrypts, is not installed.
    """

    name = "objects"

    def __init__(
        self,
        url: str,
        *,
        verify: Literal["load", "never"] = "load",
        compress: Literal["zstd"] | None = None,
        master_key: bytes | None = None,
        budget_bytes: int | None = None,
        **options: Any,
    ) -> None:
        if verify not in ("load", "never"):
            raise ConfigError(f"verify={verify!r}: expected 'load' or 'never'")
        self.url = url
        self._bucket = Bucket(url, options)
        self._filters = Filters(compress, master_key)
        self._trouble = BucketTrouble(self._bucket, url)
        self._fetching = Fetching(self._bucket, self._filters, self._trouble, verify=verify == "load")
        self._room = BucketRoom(budget_bytes, self._entries, self._evict)

    def probe(self, timeout_seconds: float = 10.0) -> bool:
        """Whether the bucket can be read: asked once, and waited for so long; False if nobody answers.

        Raises:
            ConfigError: no credentials, wrong ones, no permission to list, or no such bucket.
        """
        found: list[Exception | None] = []

        def ask() -> None:
            try:
                self._bucket.probe()
                found.append(None)
            except Exception as error:
                found.append(error)

        asking = threading.Thread(target=ask, name="kvrag-probe", daemon=True)
        asking.start()
        asking.join(timeout_seconds)
        error = found[0] if found else TimeoutError(f"no answer within {timeout_seconds:g} s")
        if error is None:
            return True
        if is_refusal(error):
            raise ConfigError(f"{self.url} cannot be used: {in_words(error)}") from error
        logger.warning("%s cannot be reached now: %s", self.url, in_words(error))
        return False

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Fetch the entry's rows; see `KVStore.get`."""
        try:
            kv = self._fetching.rows(key, by_layer=by_layer)
        except Damaged as damage:
            self._trouble.lose(key.id, damage)
            raise self._trouble.miss(key.id, str(damage)) from damage
        except (CacheMiss, ConfigError, MissingExtra):
            raise
        except Exception as error:
            raise self._trouble.unread(key.id, error) from error
        self._trouble.count("hits")
        self._trouble.over()
        self._room.note_read(key.id)
        return kv

    @property
    def master_key(self) -> MasterKey | None:
        """What its entries are encrypted with; None: they are not."""
        return self._filters.key

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Where rows have to be read from."""
        return (self.name,)

    def locate(self, key: EntryKey) -> Place | None:
        """The bucket, presumed to have the entry: asking takes about as long as reading it."""
        return Place(self.name, is_certain=False)

    def counts(self) -> dict[str, int]:
        """What has happened since this was made; see `Counting`."""
        names = ("damaged", "write_failures", "read_failures", "evictions", "evicted_bytes")
        return {name: self._trouble.counts[name] for name in names}

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Upload the entry; one of the same name is replaced.

        Raises:
            ConfigError: the rows are not of this key.
            StoreWriteError: nothing was written.
        """
        check_rows(key, kv)
        check_times(cost_seconds, ttl_seconds)
        if not layout.is_storable(key.fingerprint.dtype):
            raise ConfigError(f"no file format for elements of type {key.fingerprint.dtype}")
        codec_named(key.fingerprint.codec)  # refuses unknown names
        now = time.time()
        expires = None if ttl_seconds is None else now + ttl_seconds
        manifest, parts = layout.encode(
            key, kv, now, cost_seconds=cost_seconds, expires=expires, filters=self._filters
        )
        raw = in_one_piece(layout.dump_manifest(manifest), parts, cost_seconds=cost_seconds, expires=expires)
        self._upload(key.id, raw)

    def export_bytes(self, key_id: str) -> EntryBytes:
        """The entry's bytes; see `MovesBytes`."""
        if not _ID.fullmatch(key_id):
            raise CacheMiss("no such entry")
        try:
            opened = OpenedObject(self._bucket, object_name(key_id))
            opened.fetch(0, opened.frame.data_bytes)
        except Damaged as damage:
            self._trouble.lose(key_id, damage)
            raise self._trouble.miss(key_id, str(damage)) from damage
        except Exception as error:
            raise self._trouble.unread(key_id, error) from error
        self._trouble.count("bytes_read", opened.frame.data_bytes)
        frame = opened.frame
        return EntryBytes(key_id, opened.raw_manifest, opened.data, frame.cost_seconds, frame.expires)

    def import_bytes(self, entry: EntryBytes) -> None:
        """Upload an entry from elsewhere; see `MovesBytes`."""
        entry.verified()
        data = [entry.data.numpy().data]
        raw = in_one_piece(entry.manifest, data, cost_seconds=entry.cost_seconds, expires=entry.expires)
        self._upload(entry.id, raw)

    def delete(self, key_id: str) -> Receipt:
        """Remove the object, and what quarantine has of it.

        Raises:
            StoreWriteError: it cannot be removed, or nobody knows whether it was.
        """
        if not _ID.fullmatch(key_id):
            return Receipt(key_id, False)
        self._fetching.fetch_lent(key_id)
        erased, num_bytes = [], 0
        try:
            for name in (object_name(key_id), *self._trouble.quarantined(key_id)):
                size = self._bucket.size(name)
                if size is not None and self._bucket.remove(name):
                    erased.append(name)
                    num_bytes += size
        except Exception as error:
            raise self._trouble.unwritten(error, "the object may still be there; delete it again") from error
        places = tuple(f"objects: {self._bucket.address(name)}" for name in erased)
        return Receipt(key_id, object_name(key_id) in erased, places, num_bytes)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id; does not read it. False if nobody knows."""
        key_id = key.id if isinstance(key, EntryKey) else key
        if not (isinstance(key_id, str) and _ID.fullmatch(key_id)):
            return False
        try:
            return self._bucket.size(object_name(key_id)) is not None
        except Exception as error:
            self._trouble.warn(f"cannot look for entry {key_id[:12]}", error)
            return False

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in no order.

        Raises:
            StoreError: they cannot be listed.
        """
        return iter([entry.id for entry in self._entries()])

    def stats(self) -> StoreStats:
        """Counts since this object was made, and sizes of what is there, as far as it can be listed."""
        try:
            sizes = [entry.num_bytes for entry in self._entries()]
        except StoreError as error:
            self._trouble.warn("sizes are unknown", error)
            sizes = []
        counts = self._trouble.counts
        return StoreStats(
            entries=len(sizes),
            num_bytes=sum(sizes),
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=counts["damaged"],
            write_failures=counts["write_failures"],
            bytes_read=counts["bytes_read"],
            evictions=counts["evictions"],
            evicted_bytes=counts["evicted_bytes"],
        )

    @property
    def read_failures(self) -> int:
        """Reads that failed for other reasons than absence or damage: no network, no permission, ..."""
        return self._trouble.counts["read_failures"]

    def check(self, *, fix: bool = False) -> CheckReport:
        """Fetch and verify every entry, and find what uploads have left behind.

        Args:
            fix: set damaged entries aside and remove partial objects; only while nobody else uploads.

        Raises:
            StoreError: entries cannot be listed, or one cannot be fetched.
        """
        damaged = []
        for key_id in self.ids():
            try:
                opened = OpenedObject(self._bucket, object_name(key_id))
                opened.fetch(0, opened.frame.data_bytes)
                EntryBytes(key_id, opened.raw_manifest, opened.data).verified()
            except FileNotFoundError:
                continue
            except Damaged as damage:
                damaged.append(key_id)
                if fix:
                    self._trouble.lose(key_id, damage)
            except Exception as error:
                raise StoreError(f"cannot check {self.url}: {error}") from error
        orphans = [found.name for found in self._list(lambda name: name.endswith(PARTIAL))]
        if fix:
            for name in orphans:
                self._bucket.remove(name)
        return CheckReport(tuple(damaged), tuple(orphans), fixed=fix)

    def sweep(self) -> tuple[str, ...]:
        """Remove entries whose time to live is over, and what is beyond the budget; their ids.

        Raises:
            StoreError: entries cannot be listed.
            StoreWriteError: one cannot be removed.
        """
        over = []
        for key_id in self.ids():
            with suppress(Damaged, FileNotFoundError):
                expires = Frame.parse(self._bucket.read(object_name(key_id), 0, HEADER_BYTES)).expires
                if expires is not None and expires <= time.time():
                    self.delete(key_id)
                    over.append(key_id)
        try:
            over += self._room.keep()
        except StoreError:
            raise
        except Exception as error:
            raise self._trouble.unwritten(error, "the budget is not kept") from error
        return tuple(over)

    def close(self) -> None:
        """Nothing to release; the store can be used again."""

    def _upload(self, key_id: str, raw: bytes) -> None:
        try:
            self._room.make(key_id, len(raw))
            self._bucket.write(object_name(key_id), [raw])
        except EntryTooLarge:
            self._trouble.count("write_failures")
            raise
        except Exception as error:
            self._trouble.count("write_failures")
            raise self._trouble.unwritten(error, "nothing was uploaded") from error
        self._trouble.lost.pop(key_id, None)

    def _evict(self, entry: Listed) -> bool:
        """Remove an entry for another one; false if somebody else has."""
        self._fetching.fetch_lent(entry.id)
        if not self._bucket.remove(object_name(entry.id)):
            return False
        self._trouble.count("evictions")
        self._trouble.count("evicted_bytes", entry.num_bytes)
        return True

    def _entries(self) -> Iterator[Listed]:
        for found in self._list(lambda name: entry_of(name) is not None):
            yield Listed(entry_of(found.name) or "", found.num_bytes, found.modified)

    def _list(self, wanted: Callable[[str], bool]) -> list[Object]:
        try:
            return list(self._bucket.list("", wanted))
        except Exception as error:
            self._trouble.count("read_failures")
            raise StoreError(
                f"cannot list {self.url}: {error!r}; try again when it can be reached"
            ) from error

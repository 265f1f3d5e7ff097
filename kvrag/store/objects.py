"""The store that is shared: one object per entry in a bucket, or in a folder that many machines see."""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

import torch

from kvrag.errors import CacheMiss, ConfigError, MissingExtra, StoreError, StoreWriteError
from kvrag.segments import KV, LayerKV
from kvrag.store import layout
from kvrag.store.base import CheckReport, Receipt, StoreStats, check_rows, check_times
from kvrag.store.bucket import Bucket
from kvrag.store.codec import codec_named
from kvrag.store.files import PARTIAL
from kvrag.store.filters import Filters
from kvrag.store.found import Place
from kvrag.store.key import EntryKey, token_bytes
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.lazy import FetchedLayers
from kvrag.store.moving import HEADER_BYTES, EntryBytes, Frame, in_one_piece
from kvrag.store.sealing import MasterKey

logger = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})\.kvrag")
_ID = re.compile(r"[0-9a-f]{64}")
_FIRST = 64 << 10  # holds frame, manifest and header of nearly every entry
_MAX_QUARANTINED = 8
_AHEAD = 4  # layers under way at once: a request takes about as long for one as for none


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
        options: for the file system, such as `key`, `secret`, `endpoint_url`.

    Raises:
        ConfigError: fsspec cannot open the URL, or a setting cannot work.
        MissingExtra: fsspec, or what compresses or encrypts, is not installed.
    """

    name = "objects"

    def __init__(
        self,
        url: str,
        *,
        verify: Literal["load", "never"] = "load",
        compress: Literal["zstd"] | None = None,
        master_key: bytes | None = None,
        **options: Any,
    ) -> None:
        if verify not in ("load", "never"):
            raise ConfigError(f"verify={verify!r}: expected 'load' or 'never'")
        self.url = url
        self._bucket = Bucket(url, options)
        self._verify = verify == "load"
        self._filters = Filters(compress, master_key)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._lent: dict[str, weakref.WeakSet[FetchedLayers]] = {}
        self._lost: dict[str, bytes] = {}  # damaged entries that could not be set aside, by manifest

    def get(self, key: EntryKey, *, by_layer: bool = False) -> KV:
        """Fetch the entry's rows; see `KVStore.get`."""
        try:
            kv = self._rows(key, _Opened(self._bucket, _name(key.id)), by_layer=by_layer)
        except Damaged as damage:
            self._lose(key.id, damage)
            raise self._miss(key.id, str(damage)) from damage
        except (CacheMiss, ConfigError, MissingExtra):
            raise
        except Exception as error:
            raise self._unread(key.id, error) from error
        self._count("hits")
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
        return {name: self._counts[name] for name in ("damaged", "write_failures", "read_failures")}

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
            opened = _Opened(self._bucket, _name(key_id))
            opened.fetch(0, opened.frame.data_bytes)
        except Damaged as damage:
            self._lose(key_id, damage)
            raise self._miss(key_id, str(damage)) from damage
        except Exception as error:
            raise self._unread(key_id, error) from error
        self._count("bytes_read", opened.frame.data_bytes)
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
        with self._lock:
            lent = list(self._lent.pop(key_id, ()))
        for layers in lent:
            with suppress(CacheMiss):  # whoever holds it finds out when touching it
                tuple(layers)
        erased, num_bytes = [], 0
        try:
            for name in (_name(key_id), *(name for name, _ in self._quarantined(key_id))):
                size = self._bucket.size(name)
                if size is not None and self._bucket.remove(name):
                    erased.append(name)
                    num_bytes += size
        except Exception as error:
            raise self._unwritten(error, "the object may still be there; delete it again") from error
        places = tuple(f"objects: {self._bucket.address(name)}" for name in erased)
        return Receipt(key_id, _name(key_id) in erased, places, num_bytes)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id; does not read it. False if nobody knows."""
        key_id = key.id if isinstance(key, EntryKey) else key
        if not (isinstance(key_id, str) and _ID.fullmatch(key_id)):
            return False
        try:
            return self._bucket.size(_name(key_id)) is not None
        except Exception as error:
            self._warn(f"cannot look for entry {key_id[:12]}", error)
            return False

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in no order.

        Raises:
            StoreError: they cannot be listed.
        """
        return iter([key_id for key_id, _ in self._entries()])

    def stats(self) -> StoreStats:
        """Counts since this object was made, and sizes of what is there, as far as it can be listed."""
        try:
            sizes = [size for _, size in self._entries()]
        except StoreError as error:
            self._warn("sizes are unknown", error)
            sizes = []
        counts = self._counts
        return StoreStats(
            entries=len(sizes),
            num_bytes=sum(sizes),
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=counts["damaged"],
            write_failures=counts["write_failures"],
            bytes_read=counts["bytes_read"],
        )

    @property
    def read_failures(self) -> int:
        """Reads that failed for other reasons than absence or damage: no network, no permission, ..."""
        return self._counts["read_failures"]

    def check(self, *, fix: bool = False) -> CheckReport:
        """Fetch and verify every entry, and find what uploads have left behind.

        Args:
            fix: set damaged entries aside and remove partial objects; only while nobody else uploads.

        Raises:
            StoreError: entries cannot be listed, or one cannot be fetched.
        """
        damaged = []
        for key_id, _ in self._entries():
            try:
                opened = _Opened(self._bucket, _name(key_id))
                opened.fetch(0, opened.frame.data_bytes)
                EntryBytes(key_id, opened.raw_manifest, opened.data).verified()
            except FileNotFoundError:
                continue
            except Damaged as damage:
                damaged.append(key_id)
                if fix:
                    self._lose(key_id, damage)
            except Exception as error:
                raise StoreError(f"cannot check {self.url}: {error}") from error
        orphans = [name for name, _ in self._list(lambda name: name.endswith(PARTIAL))]
        if fix:
            for name in orphans:
                self._bucket.remove(name)
        return CheckReport(tuple(damaged), tuple(orphans), fixed=fix)

    def sweep(self) -> tuple[str, ...]:
        """Remove entries whose time to live is over; their ids.

        Raises:
            StoreError: entries cannot be listed.
            StoreWriteError: one cannot be removed.
        """
        over = []
        for key_id, _ in self._entries():
            with suppress(Damaged, FileNotFoundError):
                expires = Frame.parse(self._bucket.read(_name(key_id), 0, HEADER_BYTES)).expires
                if expires is not None and expires <= time.time():
                    self.delete(key_id)
                    over.append(key_id)
        return tuple(over)

    def close(self) -> None:
        """Nothing to release; the store can be used again."""

    # --- reading ---

    def _rows(self, key: EntryKey, opened: _Opened, *, by_layer: bool) -> KV:
        """Fetch and verify an entry; by layer only what lies around the rows.

        Raises:
            Damaged: it is not what its manifest and this key say.
            CacheMiss: its time is over.
        """
        frame, fields = opened.frame, key.fingerprint.fields()
        if self._lost.get(key.id) == opened.raw_manifest:
            raise Damaged("it was found damaged before")
        if frame.expires is not None and frame.expires <= time.time():
            raise self._miss(key.id, "its time to live is over")
        manifest, cipher = layout.reveal(opened.manifest, self._filters)
        if manifest.id != key.id:
            raise Damaged(f"the entry belongs to another name, {manifest.id[:12]}")
        if manifest.fingerprint != fields:
            other = {name: manifest.fingerprint.get(name) for name, v in fields.items()}
            raise Damaged(f"the entry was made for {other}, asked for was {fields}")
        spans = list(manifest.layer_spans())
        if by_layer:
            opened.fetch(0, manifest.data_start)
            opened.fetch(spans[-1][1] if spans else manifest.data_start, manifest.file_size)
        else:
            opened.fetch(0, manifest.file_size)
        if self._verify:
            (layout.verify_frame if by_layer else layout.verify)(opened.data, manifest)
        if layout.stored_tokens(opened.data, manifest, cipher) != token_bytes(key.tokens):
            raise Damaged("the entry holds other tokens")
        layer = layout.reader(opened.data, manifest, key, cipher)
        if by_layer:
            return self._by_layer(key, opened, manifest, layer)
        self._count("bytes_read", sum(end - start for start, end in spans))
        return KV(key.tokens, tuple(map(layer, range(len(spans)))))

    def _by_layer(
        self, key: EntryKey, opened: _Opened, manifest: Manifest, layer: Callable[[int], LayerKV]
    ) -> KV:
        """The same rows, each layer fetched, verified and counted when it is first touched."""
        spans = list(opened.manifest.layer_spans())

        def prove(number: int) -> LayerKV:
            start, end = spans[number]
            try:
                opened.fetch(start, end)
                if self._verify:
                    layout.verify_layer(opened.data, opened.manifest, number, (start, end))
                rows = layer(number)
            except Damaged as damage:
                self._lose(key.id, damage, unless_changed=opened.raw_manifest)
                raise self._miss(key.id, str(damage)) from damage
            except Exception as error:
                raise self._unread(key.id, error) from error
            self._count("bytes_read", end - start)
            return rows

        sizes = manifest.row_bytes()
        layers = FetchedLayers(len(key.tokens), sizes, prove, ahead=_AHEAD)
        with self._lock:
            self._lent.setdefault(key.id, weakref.WeakSet()).add(layers)
            for key_id in [k for k, lent in self._lent.items() if not lent]:
                del self._lent[key_id]
        return KV(key.tokens, layers)

    def _miss(self, key_id: str, reason: str) -> CacheMiss:
        self._count("misses")
        return CacheMiss(f"no usable entry {key_id[:12]} in {self.url}: {reason}")

    def _unread(self, key_id: str, error: Exception) -> CacheMiss:
        """Count what cannot be read, with a warning unless it is just not there; the error to raise."""
        if not isinstance(error, FileNotFoundError):
            self._warn(f"entry {key_id[:12]} cannot be read and will be recomputed", error)
        return self._miss(key_id, "absent" if isinstance(error, FileNotFoundError) else repr(error))

    def _warn(self, what: str, error: Exception) -> None:
        self._count("read_failures")
        logger.warning("%s: %s in %s", what, error or repr(error), self.url)

    # --- writing ---

    def _upload(self, key_id: str, raw: bytes) -> None:
        try:
            self._bucket.write(_name(key_id), [raw])
        except Exception as error:
            self._count("write_failures")
            raise self._unwritten(error, "nothing was uploaded") from error
        self._lost.pop(key_id, None)

    def _unwritten(self, error: Exception, what: str) -> StoreWriteError:
        number = getattr(error, "errno", None) or errno.EIO
        return StoreWriteError(number, f"cannot write to {self.url} ({error!r}): {what}")

    def _lose(self, key_id: str, damage: Damaged, *, unless_changed: bytes | None = None) -> None:
        """Move a damaged object out of the way, for a person to look at."""
        try:
            current = _Opened(self._bucket, _name(key_id)).raw_manifest
        except Damaged:
            current = b""
        except Exception:
            return  # gone, or out of reach: there is nothing to move
        if (unless_changed is not None and current != unless_changed) or self._lost.get(key_id) == current:
            return  # replaced meanwhile, or known
        self._count("damaged")
        logger.warning(
            "entry %s in %s is not usable and will be recomputed: %s", key_id[:12], self.url, damage
        )
        try:
            self._bucket.move(_name(key_id), f"quarantine/{key_id}.{time.time_ns()}.kvrag")
            names = sorted((name for name, _ in self._quarantined("")), key=lambda name: name.split(".")[1])
            for name in names[:-_MAX_QUARANTINED]:
                self._bucket.remove(name)
        except Exception as error:
            self._lost[key_id] = current
            logger.warning("it could not be moved aside: %s", error)

    # --- listing ---

    def _entries(self) -> Iterator[tuple[str, int]]:
        for name, size in self._list(lambda name: _NAME.fullmatch(name) is not None):
            yield name[3:67], size

    def _list(self, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
        try:
            return list(self._bucket.list("", wanted))
        except Exception as error:
            self._count("read_failures")
            raise StoreError(
                f"cannot list {self.url}: {error!r}; try again when it can be reached"
            ) from error

    def _quarantined(self, key_id: str) -> list[tuple[str, int]]:
        return list(self._bucket.list("quarantine", lambda name: name.startswith(f"quarantine/{key_id}")))

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number


class _Opened:
    """One object of which some bytes are here: frame and manifest, and of the data what was fetched.

    Args:
        bucket: where it lies.
        name: of the object.

    Raises:
        Damaged: it does not begin like an entry.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        first = bucket.read(name, 0, _FIRST)
        self.frame = frame = Frame.parse(first)
        if frame.data_start > len(first) == _FIRST:
            first += bucket.read(name, _FIRST, frame.data_start)
        self.raw_manifest = first[HEADER_BYTES : HEADER_BYTES + frame.manifest_bytes]
        self.manifest: Manifest = layout.parse_manifest(self.raw_manifest)
        if frame.data_bytes != self.manifest.file_size:
            raise Damaged("the object and its manifest disagree in the length of the data")
        # Pages that nothing is fetched into are never taken from the system.
        self.data = torch.empty(frame.data_bytes, dtype=torch.uint8)
        here = first[frame.data_start :][: frame.data_bytes]
        self.data.numpy().data[: len(here)] = here
        self._first_bytes = len(here)

    def fetch(self, start: int, end: int) -> None:
        """Have bytes `start` to `end` of the data here.

        Raises:
            Damaged: the object ends before.
        """
        start = max(start, self._first_bytes)
        if start >= end:
            return
        place = self.data.numpy().data[start:end]
        if self._bucket.read_into(self._name, self.frame.data_start + start, place) != end - start:
            raise Damaged("the object is shorter than its manifest says")


def _name(key_id: str) -> str:
    return f"{key_id[:2]}/{key_id}.kvrag"

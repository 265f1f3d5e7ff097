"""The store that lasts: one data file and one manifest per entry, mapped when they are read."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from kvrag.errors import CacheMiss, ConfigError
from kvrag.segments import KV, LayerKV, LazyLayers
from kvrag.store import advice, layout
from kvrag.store.base import CheckReport, Receipt, StoreStats, check_rows
from kvrag.store.codec import codec_named
from kvrag.store.files import (
    PARTIAL,
    commit,
    exclusive,
    make_folder,
    remove,
    sync_folder,
    write_error,
    write_partial,
)
from kvrag.store.kept import KeptEntries, Signature
from kvrag.store.key import EntryKey, Fingerprint, token_bytes
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.lazy import MappedLayers

logger = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{64}")
_MAX_QUARANTINED = 8
_MAX_READS = 3
_ABSENT = (0, 0, 0)


class DiskStore:
    """A folder of entries, shared by any number of processes; docs/store-format.md has the format.

    An entry exists if and only if its manifest does. The order in which files change:

    | step            | files before -> after              | a crash here leaves            |
    |-----------------|------------------------------------|--------------------------------|
    | put: write      | -> data.partial, manifest.partial  | partial files, found by check  |
    | put: commit     | data.partial -> data               | data of no entry, same         |
    |                 | manifest.partial -> manifest       | the entry                      |
    | delete          | manifest ->                        | data of no entry, found by check |
    |                 | data ->                            | nothing                        |

    Names change under the store's lock file only, and files are never changed in place, so readers need
    no lock: what they have mapped stays as it was, also for a layer that is touched long after. Cutting or
    overwriting a file of the store by other means while it is mapped is not protected against (the
    operating system raises SIGBUS).

    Args:
        path: the folder; created by the first `put`.
        verify: "load" checks every byte whenever a file is newly mapped, or by layer every byte of a layer
            when it is first touched; "never" checks sizes, manifest and tokens only.
        keep_bytes: how many bytes of verified files stay mapped, to be handed out again without another
            check while the files are unchanged; 0 switches this off.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        verify: Literal["load", "never"] = "load",
        keep_bytes: int = 4 << 30,
    ) -> None:
        if verify not in ("load", "never"):
            raise ConfigError(f"verify={verify!r}: expected 'load' or 'never'")
        self.path = Path(path)
        self._root = str(self.path)
        self._verify = verify
        self._kept = KeptEntries(keep_bytes)
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
            CacheMiss: absent, or damaged or foreign and then moved to `quarantine/` and counted.
        """
        for _ in range(_MAX_READS):
            signature = self._signature(key.id)
            if signature is None or self._lost.get(key.id) == signature:
                break
            try:
                kv = self._kept.get(key.id, signature)
                if kv is None or (isinstance(kv.layers, LazyLayers) and not by_layer):
                    kv = self._load(key, signature, by_layer=by_layer)
            except Damaged as damage:
                if self._signature(key.id) != signature:
                    continue  # it was being replaced while we read it
                self._set_aside(key.id, str(damage), signature)
                break
            self._count("hits")
            return kv
        raise self._miss(key.id)

    def put(
        self, key: EntryKey, kv: KV, *, cost_seconds: float = 0.0, ttl_seconds: float | None = None
    ) -> None:
        """Write the rows so that a crash after the return does not lose them.

        An intact entry under this key is left as it is: equal keys have equal rows.

        Raises:
            ConfigError: the rows are not of this key.
            StoreWriteError: nothing was written; the message says what to do.
        """
        check_rows(key, kv)
        if not layout.is_storable(key.fingerprint.dtype):
            raise ConfigError(f"no file format for elements of type {key.fingerprint.dtype}")
        codec_named(key.fingerprint.codec)  # refuses unknown names
        try:
            if not self._is_intact(key):
                self._write(key, kv)
        except OSError as error:
            self._count("write_failures")
            raise write_error(error, self.path) from error

    def delete(self, key_id: str) -> Receipt:
        """Remove the entry, its bytes and what quarantine may hold of it.

        Raises:
            StoreWriteError: the files cannot be removed.
        """
        if not _ID.fullmatch(key_id):
            return Receipt(key_id, False)
        self._kept.drop(key_id)
        manifest, data = self._files(key_id)
        try:
            if not (manifest.exists() or data.exists() or any(self._quarantined(key_id))):
                return Receipt(key_id, False)
            erased, num_bytes = [], 0
            with exclusive(self._lock_file):
                existed = manifest.exists()
                for file in (manifest, data, *self._quarantined(key_id)):
                    if file.exists():
                        num_bytes += file.stat().st_size
                        file.unlink(missing_ok=True)
                        erased.append(f"disk: {file.relative_to(self.path)}")
                if data.parent.is_dir():
                    sync_folder(data.parent)
        except OSError as error:
            raise write_error(error, self.path) from error
        return Receipt(key_id, existed, tuple(erased), num_bytes)

    def __contains__(self, key: object) -> bool:
        """Whether an entry exists under this `EntryKey` or id; does not read it."""
        key_id = key.id if isinstance(key, EntryKey) else key
        return isinstance(key_id, str) and bool(_ID.fullmatch(key_id)) and self._files(key_id)[0].exists()

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in no order."""
        for file in self.path.glob("[0-9a-f][0-9a-f]/*.json"):
            if _ID.fullmatch(file.stem) and file.stem[:2] == file.parent.name:
                yield file.stem

    def stats(self) -> StoreStats:
        """Counts since this object was made, and sizes on the disk."""
        sizes = [self._signature(key_id) for key_id in self.ids()]
        counts = self._counts
        return StoreStats(
            entries=len(sizes),
            num_bytes=sum(size for signature in sizes if signature for _, size, _ in signature),
            hits=counts["hits"],
            misses=counts["misses"],
            damaged=counts["damaged"],
            write_failures=counts["write_failures"],
            bytes_read=counts["bytes_read"],
        )

    def check(self, *, fix: bool = False, grace_seconds: float = 3600.0) -> CheckReport:
        """Verify every byte of every entry and find files that belong to none.

        Args:
            fix: move damaged entries to `quarantine/` and remove orphans.
            grace_seconds: partial files younger than this may still be written to and are no orphans.
        """
        damaged = []
        for key_id in list(self.ids()):
            signature = self._signature(key_id)
            try:
                self._verify_entry(key_id)
            except Damaged as damage:
                if signature is None or self._signature(key_id) != signature:
                    continue
                damaged.append(key_id)
                if fix:
                    self._set_aside(key_id, str(damage), signature)
        orphans = self._orphans(grace_seconds)
        if fix and orphans:
            with exclusive(self._lock_file):  # nobody commits now: what is an orphan still, is one
                for file in self._orphans(grace_seconds):
                    remove(file)
        return CheckReport(tuple(damaged), tuple(str(f.relative_to(self.path)) for f in orphans), fixed=fix)

    def damage(self, key_id: str) -> str | None:
        """What is wrong with an entry's bytes, every one of them read; None if nothing is.

        Raises:
            CacheMiss: there is no such entry.
        """
        if key_id not in self:
            raise CacheMiss(f"no entry {key_id[:12]} in {self.path}")
        try:
            self._verify_entry(key_id)
        except Damaged as damage:
            return str(damage)
        return None

    def files_of(self, key_id: str) -> tuple[Path, Path]:
        """Where manifest and data file of an entry lie, or would."""
        if not _ID.fullmatch(key_id):
            raise ConfigError(f"{key_id!r} is no name of an entry")
        return self._files(key_id)

    def adopt(self, other: DiskStore, key_id: str) -> bool:
        """Move an entry over from another store in the same file system; False if it is here already.

        Raises:
            StoreWriteError: the files cannot be moved.
        """
        (manifest, data), (manifest_here, data_here) = other.files_of(key_id), self.files_of(key_id)
        try:
            make_folder(data_here.parent)
            with exclusive(self._lock_file):
                if key_id in self:
                    return False
                commit(data, data_here)
                commit(manifest, manifest_here)
        except OSError as error:
            raise write_error(error, self.path) from error
        return True

    def close(self) -> None:
        """Forget the mappings; rows already handed out stay valid, and the store can be used again."""
        self._kept.clear()

    @property
    def _lock_file(self) -> Path:
        return self.path / "store.lock"

    def _files(self, key_id: str) -> tuple[Path, Path]:
        """Manifest and data file of an entry."""
        folder = self.path / key_id[:2]
        return folder / f"{key_id}.json", folder / f"{key_id}.safetensors"

    def _signature(self, key_id: str) -> Signature | None:
        """What both files look like from outside; None if there is no manifest."""
        found = []
        for suffix in ("json", "safetensors"):
            try:
                stat = os.stat(f"{self._root}/{key_id[:2]}/{key_id}.{suffix}")  # Path takes longer than stat
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(_ABSENT)
        return None if found[0] == _ABSENT else tuple(found)

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    def _miss(self, key_id: str) -> CacheMiss:
        """Forget and count an entry that is not usable; the error to raise."""
        self._kept.drop(key_id)
        self._count("misses")
        return CacheMiss(f"no usable entry {key_id[:12]} in {self.path}")

    def _manifest(self, key_id: str) -> Manifest:
        try:
            raw = self._files(key_id)[0].read_bytes()
        except OSError as error:
            raise Damaged(f"the manifest cannot be read: {error}") from error
        return layout.parse_manifest(raw)

    def _load(self, key: EntryKey, signature: Signature, *, by_layer: bool = False) -> KV:
        """Map, verify and remember an entry; by layer only what lies around the rows is verified.

        Raises:
            Damaged: it is not what its manifest and this key say.
        """
        manifest = self._manifest(key.id)
        fields = key.fingerprint.fields()
        if manifest.fingerprint != fields:
            other = {name: manifest.fingerprint.get(name) for name, v in fields.items()}
            raise Damaged(f"the entry was made for {other}, asked for was {fields}")
        data = layout.map_file(self._files(key.id)[1], manifest)
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
            self._kept.keep(key_id, signature, kv, max(manifest.file_size, sum(manifest.row_bytes())))

    def _lose(self, key_id: str, signature: Signature, damage: Damaged) -> None:
        """Set an entry aside that was handed out before, unless other files have taken its place."""
        if self._signature(key_id) != signature or self._lost.get(key_id) == signature:
            return
        self._set_aside(key_id, str(damage), signature)
        if self._signature(key_id) == signature:
            # A read-only store. Its header is intact: without this, who starts over would find it again.
            self._lost[key_id] = signature

    def _verify_entry(self, key_id: str) -> None:
        """Prove an entry by itself: every byte, and that its content gives its name.

        Raises:
            Damaged: something differs.
        """
        manifest = self._manifest(key_id)
        data = layout.map_file(self._files(key_id)[1], manifest)
        layout.verify(data, manifest)
        raw = layout.stored_tokens(data, manifest)
        tokens = tuple(int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4))
        try:
            fingerprint = Fingerprint(**manifest.fingerprint)  # type: ignore[arg-type]  # str | int from JSON
        except TypeError as error:
            raise Damaged(f"the manifest has other fingerprint fields: {error}") from error
        if EntryKey(fingerprint, tokens).id != key_id:
            raise Damaged("the entry's content belongs to another name")

    def _is_intact(self, key: EntryKey) -> bool:
        signature = self._signature(key.id)
        if signature is None:
            return False
        try:
            self._load(key, signature)
        except Damaged:
            return False
        return True

    def _write(self, key: EntryKey, kv: KV) -> None:
        manifest, parts = layout.encode(key.fingerprint, kv, time.time())
        manifest_file, data_file = self._files(key.id)
        make_folder(data_file.parent)
        stem = f"{key.id}.{uuid.uuid4().hex}"
        data_part = data_file.with_name(f"{stem}.safetensors{PARTIAL}")
        manifest_part = data_file.with_name(f"{stem}.json{PARTIAL}")
        try:
            write_partial(data_part, parts)
            write_partial(manifest_part, [layout.dump_manifest(manifest)])
            with exclusive(self._lock_file):
                if self._is_intact(key):
                    return  # another process was faster
                self._kept.drop(key.id)
                manifest_file.unlink(missing_ok=True)  # of a damaged entry: must not meet the new data
                try:
                    commit(data_part, data_file)
                    commit(manifest_part, manifest_file)
                except BaseException:
                    if not manifest_file.exists():
                        remove(data_file)
                    raise
        finally:
            remove(data_part)
            remove(manifest_part)

    def _set_aside(self, key_id: str, reason: str, signature: Signature) -> None:
        """Move a damaged entry out of the way, for a person to look at; the manifest first."""
        self._count("damaged")
        logger.warning(
            "entry %s in %s is not usable and will be recomputed: %s", key_id[:12], self.path, reason
        )
        folder = self.path / "quarantine"
        try:
            with exclusive(self._lock_file):
                if self._signature(key_id) != signature:
                    return  # somebody has mended it meanwhile
                folder.mkdir(exist_ok=True)
                for file in self._files(key_id):
                    if file.exists():
                        commit(file, folder / f"{key_id}.{time.time_ns()}{file.suffix}")
                self._empty_quarantine(_MAX_QUARANTINED)
        except OSError as error:
            logger.warning("it could not be moved aside: %s", error)

    def _quarantined(self, key_id: str) -> list[Path]:
        return list((self.path / "quarantine").glob(f"{key_id}.*"))

    def _empty_quarantine(self, keep: int) -> None:
        """Leave the files of the last `keep` damaged entries."""
        files = sorted(
            (self.path / "quarantine").iterdir(), key=lambda f: f.name.split(".")[1:2], reverse=True
        )
        newest = list(dict.fromkeys(f.name.split(".")[0] for f in files))[:keep]
        for file in files:
            if file.name.split(".")[0] not in newest:
                remove(file)

    def _orphans(self, grace_seconds: float) -> list[Path]:
        """Partial files past their grace, and data files without manifest."""
        now, orphans = time.time(), []
        for file in self.path.glob("[0-9a-f][0-9a-f]/*"):
            try:
                age = now - file.stat().st_mtime
            except OSError:
                continue  # gone meanwhile
            if file.suffix == PARTIAL:
                if age > grace_seconds:
                    orphans.append(file)
            elif file.suffix == ".safetensors" and not file.with_suffix(".json").exists():
                orphans.append(file)
        return orphans

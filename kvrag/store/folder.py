"""The files of a store's entries: their names, what they look like from outside, and how they change.

Whatever changes names here expects the caller to hold `store.lock`.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvrag.store import layout
from kvrag.store.files import (
    PARTIAL,
    commit,
    commit_all,
    exclusive,
    make_folder,
    no_others,
    remove,
    shared,
    sync_folder,
    write_partial,
    write_partials,
)
from kvrag.store.filters import PLAIN, SEALED, Filters
from kvrag.store.kept import Signature
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.sealing import Cipher

MAX_QUARANTINED = 8
_ID = re.compile(r"[0-9a-f]{64}")
_ABSENT = (0, 0, 0)
_HEX = "0123456789abcdef"


def is_id(name: object) -> bool:
    """Whether this can be the name of an entry."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None


NewEntry = tuple[str, Manifest, Sequence[bytes | memoryview]]
"""Id, manifest and content of the data file, in pieces."""


@dataclass(slots=True)
class Listing:
    """Names in one of a store's 256 folders.

    Attributes:
        entries: ids with a manifest.
        orphans: ids with a data file and no manifest.
        partial: names of files that are being written, or were when a process died.
    """

    entries: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    partial: list[str] = field(default_factory=list)


class EntryFolder:
    """Where the entries of one store lie; see docs/store-format.md.

    Args:
        path: the store's folder, which needs not exist.
        filters: what is done to the bytes of entries.

    Raises:
        ConfigError: the folder is encrypted with another key, or has entries that are not encrypted at all.
    """

    def __init__(self, path: Path, filters: Filters = PLAIN) -> None:
        self.path = path
        self.filters = filters
        self._root = str(path)
        self._suffix = SEALED if filters.look_at(path) else "safetensors"

    # --- looking ---

    def files(self, key_id: str) -> tuple[Path, Path]:
        """Manifest and data file of an entry."""
        folder = self.path / key_id[:2]
        return folder / f"{key_id}.json", folder / f"{key_id}.{self._suffix}"

    def signature(self, key_id: str) -> Signature | None:
        """What both files look like from outside; None if there is no manifest."""
        found = []
        for suffix in ("json", self._suffix):
            try:
                stat = os.stat(f"{self._root}/{key_id[:2]}/{key_id}.{suffix}")  # Path takes longer than stat
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(_ABSENT)
        return None if found[0] == _ABSENT else tuple(found)

    def exists(self, key_id: str) -> bool:
        """Whether there is an entry: whether its manifest is there."""
        return os.path.exists(f"{self._root}/{key_id[:2]}/{key_id}.json")

    def manifest(self, key_id: str) -> Manifest:
        """What is known of an entry without reading its rows; if it is encrypted, without its fingerprint.

        Raises:
            Damaged: it cannot be read, or is none.
        """
        return layout.read_manifest(f"{self._root}/{key_id[:2]}/{key_id}.json")

    def revealed(self, key_id: str) -> tuple[Manifest, Cipher | None]:
        """The same with its fingerprint, and what opens the entry's blobs.

        Raises:
            ConfigError: it is encrypted, and there is no key.
            Damaged: it cannot be read, or is not this entry's.
        """
        manifest = self.manifest(key_id)
        if manifest.id != key_id:
            raise Damaged(f"the entry belongs to another name, {manifest.id[:12]}")
        return layout.reveal(manifest, self.filters)

    def size(self, key_id: str) -> int:
        """Bytes of an entry's files."""
        return sum(size for _, size, _ in self.signature(key_id) or ())

    def ids(self) -> Iterator[str]:
        """Ids of all entries, in the order of their first two digits; may change while they are listed."""
        for prefix in self.prefixes():
            yield from self.names(prefix).entries

    def prefixes(self) -> list[str]:
        """Names of the folders that entries lie in, sorted."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if len(name) == 2 and name[0] in _HEX and name[1] in _HEX)

    def names(self, prefix: str) -> Listing:
        """What lies in one folder; files of other names are not the store's and are left alone."""
        listing, data = Listing(), set()
        try:
            names = os.listdir(f"{self._root}/{prefix}")
        except (FileNotFoundError, NotADirectoryError):
            return listing
        for name in names:
            stem, _, suffix = name.partition(".")
            if suffix.endswith("partial"):
                listing.partial.append(name)
            elif stem[:2] == prefix and is_id(stem):
                if suffix == "json":
                    listing.entries.add(stem)
                elif suffix == self._suffix:
                    data.add(stem)
        listing.orphans = data - listing.entries
        return listing

    def traces(self, key_id: str) -> list[Path]:
        """Every file that holds something of an entry, in the order in which deleting removes them."""
        manifest, data = self.files(key_id)
        mine = [self.pin_file(key_id), self.held_file(key_id), manifest, data]
        mine += data.parent.glob(f"{key_id}.*{PARTIAL}")
        return [file for file in (*mine, *self.quarantined(key_id)) if file.exists()]

    def erasable(self, key_id: str) -> list[Path]:
        """The same, but for files that a living process may be writing: it would make a new entry of them."""
        traces = self.traces(key_id)
        partial = [file for file in traces if file.suffix == PARTIAL]
        left = self.left_behind(partial, grace_seconds=3600.0)
        return [file for file in traces if file.suffix != PARTIAL or file in left]

    def quarantined(self, key_id: str) -> list[Path]:
        """Files of an entry that were set aside."""
        return list((self.path / "quarantine").glob(f"{key_id}.*"))

    # --- pins: an empty file each, so that they need no index and outlive damage ---

    def pin_file(self, key_id: str) -> Path:
        """The file whose being there pins an entry."""
        return self.path / key_id[:2] / f"{key_id}.pin"

    def is_pinned(self, key_id: str) -> bool:
        """Whether an entry is never to be evicted."""
        return os.path.exists(f"{self._root}/{key_id[:2]}/{key_id}.pin")

    def pin(self, key_id: str, pinned: bool) -> None:
        """Pin an entry, or let go of it, so that it survives a crash."""
        file = self.pin_file(key_id)
        if pinned:
            file.touch()
        else:
            file.unlink(missing_ok=True)
        sync_folder(file.parent)

    # --- holds: the same for entries that are still to be uploaded ---

    def held_file(self, key_id: str) -> Path:
        """The file whose being there keeps an entry until it has been uploaded."""
        return self.path / key_id[:2] / f"{key_id}.held"

    def is_held(self, key_id: str) -> bool:
        """Whether an entry has to stay until it has been uploaded."""
        return os.path.exists(f"{self._root}/{key_id[:2]}/{key_id}.held")

    def hold(self, key_id: str, held: bool) -> None:
        """Hold an entry that is there or is going to be, or let go of it, so that it survives a crash."""
        file = self.held_file(key_id)
        if held == file.exists():
            return
        if held:
            make_folder(file.parent)
            file.touch()
        else:
            file.unlink(missing_ok=True)
        sync_folder(file.parent)

    def held(self) -> Iterator[str]:
        """Ids of all that are held."""
        for prefix in self.prefixes():
            for name in os.listdir(f"{self._root}/{prefix}"):
                stem, _, suffix = name.partition(".")
                if suffix == "held" and stem[:2] == prefix and is_id(stem):
                    yield stem

    # --- changing ---

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the lock that names change under.

        Raises:
            OSError: the folder does not exist or is read-only.
        """
        return exclusive(self.path / "store.lock")

    @contextmanager
    def writing(self, entries: Iterable[NewEntry]) -> Iterator[Callable[[Sequence[str]], None]]:
        """Write and sync entries under names that are nobody's; what it gives makes entries of some of them.

        Args:
            entries: ids, manifests and rows; taken one after the other, so that rows can be encoded in turn.

        Raises:
            OSError: disk full, read-only, no permission; nothing is left behind.
        """
        written: dict[str, tuple[Path, Path]] = {}

        def partials() -> Iterator[tuple[Path, Sequence[bytes | memoryview]]]:
            for key_id, manifest, parts in entries:
                data_file = self.files(key_id)[1]
                make_folder(data_file.parent)
                stem = f"{key_id}.{uuid.uuid4().hex}"
                data_part = data_file.with_name(f"{stem}.{self._suffix}{PARTIAL}")
                manifest_part = data_file.with_name(f"{stem}.json{PARTIAL}")
                written[key_id] = manifest_part, data_part
                yield data_part, parts
                yield manifest_part, [layout.dump_manifest(manifest)]

        def finish(key_ids: Sequence[str]) -> None:
            files = [(*written[key_id], *self.files(key_id)) for key_id in key_ids]
            for _, _, manifest, _ in files:
                manifest.unlink(missing_ok=True)  # of a damaged entry: must not meet the new data
            try:
                commit_all([(part, data) for _, part, _, data in files])
                commit_all([(part, manifest) for part, _, manifest, _ in files])
            except BaseException:
                for _, _, manifest, data in files:
                    if not manifest.exists():
                        remove(data)
                raise

        make_folder(self.path)
        with shared(self._writers):
            try:
                write_partials(partials())
                yield finish
            finally:
                for parts in written.values():
                    for part in parts:
                        remove(part)

    def rewrite(self, key_id: str, manifest: Manifest) -> None:
        """Put another manifest of the same rows in an entry's place, in one step."""
        file = self.files(key_id)[0]
        part = file.with_name(f"{key_id}.{uuid.uuid4().hex}.json{PARTIAL}")
        with shared(self._writers):
            try:
                write_partial(part, [layout.dump_manifest(manifest)])
                commit(part, file)
            finally:
                remove(part)

    def erase(self, key_id: str) -> int:
        """Remove an entry, the manifest first; bytes that were freed.

        Not synced: after a power failure it may be there again, and is right.
        """
        num_bytes = self.size(key_id)
        for file in self.files(key_id):
            file.unlink(missing_ok=True)
        return num_bytes

    def set_aside(self, key_id: str) -> None:
        """Move an entry to `quarantine/`, the manifest first, and keep the last few there."""
        folder = self.path / "quarantine"
        folder.mkdir(exist_ok=True)
        for file in self.files(key_id):
            if file.exists():
                commit(file, folder / f"{key_id}.{time.time_ns()}{file.suffix}")
        self.empty_quarantine()

    def empty_quarantine(self, keep: int = MAX_QUARANTINED) -> list[tuple[Path, int]]:
        """Leave the files of the last `keep` damaged entries; files that were removed, and their bytes."""
        folder = self.path / "quarantine"
        if not folder.is_dir():
            return []
        files = sorted(folder.iterdir(), key=lambda f: f.name.split(".")[1:2], reverse=True)
        newest = list(dict.fromkeys(f.name.split(".")[0] for f in files))[:keep]
        surplus = [(f, f.stat().st_size) for f in files if f.name.split(".")[0] not in newest]
        return [(file, size) for file, size in surplus if remove(file)]

    @property
    def _writers(self) -> Path:
        return self.path / "writers.lock"

    def left_behind(self, partials: Sequence[Path], grace_seconds: float) -> list[Path]:
        """Those of these partial files, listed before the call, that no living process writes to.

        Where nobody can tell, those older than the grace, or as much younger than now: clocks are set.
        """
        if partials and no_others(self._writers):
            return [file for file in partials if file.exists()]
        left, now = [], time.time()
        for file in partials:
            try:
                age = now - file.stat().st_mtime
            except OSError:
                continue  # it has become an entry meanwhile
            if abs(age) > grace_seconds:
                left.append(file)
        return left

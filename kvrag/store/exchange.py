"""Entries that come from another store, or go to one, as files: as they lie, or under another key."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag.errors import CacheMiss, ConfigError
from kvrag.store import layout
from kvrag.store.filters import Filters
from kvrag.store.folder import EntryFolder, is_id
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.ledger import Ledger
from kvrag.store.resealing import Parts, recast
from kvrag.store.writing import Writer


class Exchange:
    """Gives and takes the files of one folder's entries.

    Every method that changes something may raise `OSError` and `StoreWriteError`, as those of `Writer` do.

    Args:
        folder: the entries' files.
        ledger: their index.
        writer: changes entries.
    """

    def __init__(self, folder: EntryFolder, ledger: Ledger, writer: Writer) -> None:
        self._folder, self._ledger, self._writer = folder, ledger, writer

    def put_bytes(self, key_id: str, manifest: bytes, data: Sequence[bytes | memoryview]) -> bool:
        """Write an entry as it lies elsewhere; see `DiskStore.put_bytes`."""
        return self._writer.put_bytes(key_id, _proven(key_id, manifest, data), data)

    def adopt(self, other: Exchange, key_id: str) -> bool:
        """Take an entry from another folder; see `DiskStore.adopt`."""
        manifest = other._manifest(key_id)
        if self._folder.filters.fit(manifest.filters, manifest.key_id):
            has_moved = self._writer.adopt(key_id, manifest, other._folder.files(key_id))
            if has_moved:
                with other._ledger.locked():
                    other._ledger.settle([key_id])
            return has_moved
        manifest, parts = other._recast(key_id, self._folder.filters)
        has_moved = self._writer.put_bytes(key_id, manifest, parts)
        if has_moved:
            other._writer.delete(key_id)
        return has_moved

    def under_key(self, key_id: str, filters: Filters) -> tuple[bytes, Parts]:
        """An entry as another store would have it; see `DiskStore.under_key`."""
        manifest, parts = self._recast(key_id, filters)
        return layout.dump_manifest(manifest), parts

    def _recast(self, key_id: str, filters: Filters) -> tuple[Manifest, Parts]:
        manifest = self._manifest(key_id)
        try:
            data = layout.map_file(self._folder.files(key_id)[1], manifest)
            layout.prove_name(data, manifest, key_id, self._folder.filters)
            return recast(data, manifest, self._folder.filters, filters)
        except Damaged as damage:
            raise self._miss(key_id, damage) from damage

    def _manifest(self, key_id: str) -> Manifest:
        check_id(key_id)
        try:
            return self._folder.manifest(key_id)
        except Damaged as damage:
            raise self._miss(key_id, damage) from damage

    def _miss(self, key_id: str, damage: Damaged) -> CacheMiss:
        return CacheMiss(f"no usable entry {key_id[:12]} in {self._folder.path}: {damage}")


def check_id(key_id: str) -> None:
    """Refuse what cannot name an entry.

    Raises:
        ConfigError: no entry can have this name.
    """
    if not is_id(key_id):
        raise ConfigError(f"{key_id!r} is no name of an entry: expected 64 hex digits")


def _proven(key_id: str, manifest: bytes, data: Sequence[bytes | memoryview]) -> Manifest:
    """The manifest of an entry from elsewhere.

    Raises:
        ConfigError: it is none, or the data is not what it says.
    """
    check_id(key_id)
    try:
        found = layout.parse_manifest(manifest)
        layout.verify_parts(data, found)
    except Damaged as damage:
        raise ConfigError(f"these are not the bytes of entry {key_id[:12]}: {damage}") from damage
    if found.id != key_id:
        raise ConfigError(f"these are the bytes of entry {found.id[:12]}, not of {key_id[:12]}")
    return found

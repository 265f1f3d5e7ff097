"""Entries as bytes: how they go from tier to tier without being decoded.

What a codec, a compressor or a cipher has done to an entry stays done on the way: a copy is the same bytes
under the same name, and a tier needs neither keys nor codecs to hold it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import xxhash

from kvrag.errors import CacheMiss, ConfigError
from kvrag.store import layout
from kvrag.store.disk import DiskStore
from kvrag.store.layout import Damaged, Manifest

_MAGIC = b"kvrag\x00\x00\x01"
_HEADER = struct.Struct("<8sQQQdd")
HEADER_BYTES = 64
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class EntryBytes:
    """One entry as it lies in a store.

    Attributes:
        id: of the entry.
        manifest: its manifest, as bytes.
        data: the data file, [file_size] uint8; may be a mapping.
        cost_seconds: what reading the text took; 0 if unknown.
        expires: seconds since 1970 after which it is a miss; None: never.
    """

    id: str
    manifest: bytes
    data: torch.Tensor
    cost_seconds: float = 0.0
    expires: float | None = None

    @property
    def num_bytes(self) -> int:
        """Of manifest and data."""
        return len(self.manifest) + self.data.nbytes

    def verified(self) -> Manifest:
        """Prove that every byte is what the manifest says, and that the content gives the name.

        Raises:
            Damaged: something differs.
        """
        manifest = layout.parse_manifest(self.manifest)
        if self.data.nbytes != manifest.file_size:
            raise Damaged(f"the data has {self.data.nbytes} bytes, its manifest says {manifest.file_size}")
        layout.verify(self.data, manifest)
        layout.prove_name(self.data, manifest, self.id)
        return manifest


@runtime_checkable
class MovesBytes(Protocol):
    """A store that gives and takes entries as bytes."""

    def export_bytes(self, key_id: str) -> EntryBytes:
        """The entry's bytes, unverified.

        Raises:
            CacheMiss: there is none, or it cannot be read.
        """
        ...

    def import_bytes(self, entry: EntryBytes) -> None:
        """Keep an entry that was exported elsewhere; it may replace one of the same name.

        Raises:
            Damaged: it is not what its manifest says; nothing was written.
            StoreWriteError: nothing was written, and what was there before is still there.
        """
        ...


# --- one object or file for both parts ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """The first 64 bytes of an entry in one piece: `magic, lengths, cost, expiry, checksum`, little-endian.

    Attributes:
        manifest_bytes: length of the manifest, which follows.
        data_start: where the data begins; a multiple of 64.
        data_bytes: length of the data, which is all the rest.
        cost_seconds: see `EntryBytes`.
        expires: see `EntryBytes`.
    """

    manifest_bytes: int
    data_start: int
    data_bytes: int
    cost_seconds: float
    expires: float | None

    @property
    def num_bytes(self) -> int:
        """Length of the whole."""
        return self.data_start + self.data_bytes

    def dump(self) -> bytes:
        """The 64 bytes."""
        expires = math.inf if self.expires is None else self.expires
        head = _HEADER.pack(
            _MAGIC, self.manifest_bytes, self.data_start, self.data_bytes, self.cost_seconds, expires
        )
        return head + xxhash.xxh3_128_digest(head)

    @staticmethod
    def parse(raw: bytes) -> Frame:
        """The frame in the first bytes of an object.

        Raises:
            Damaged: they are none.
        """
        head, seal = raw[: _HEADER.size], raw[_HEADER.size : HEADER_BYTES]
        if seal != xxhash.xxh3_128_digest(head) or head[:8] != _MAGIC:
            raise Damaged("the object does not begin like an entry")
        _, manifest_bytes, data_start, data_bytes, cost, expires = _HEADER.unpack(head)
        return Frame(manifest_bytes, data_start, data_bytes, cost, None if math.isinf(expires) else expires)


def in_one_piece(
    manifest: bytes,
    data: Sequence[bytes | memoryview],
    *,
    cost_seconds: float = 0.0,
    expires: float | None = None,
) -> bytes:
    """Frame, manifest, zeros up to a multiple of 64, data.

    Args:
        manifest: of the entry.
        data: its data file, in parts.
        cost_seconds: see `EntryBytes`.
        expires: see `EntryBytes`.
    """
    start = -(-(HEADER_BYTES + len(manifest)) // _ALIGNMENT) * _ALIGNMENT
    frame = Frame(len(manifest), start, sum(map(len, data)), cost_seconds, expires)
    head = frame.dump() + manifest
    return b"".join((head, bytes(start - len(head)), *data))


# --- the disk's two files ---------------------------------------------------------------------------


class DiskBytes:
    """Gives and takes the entries of a store on disk.

    Args:
        store: the store.
    """

    def __init__(self, store: DiskStore) -> None:
        self._store = store

    def export_bytes(self, key_id: str) -> EntryBytes:
        """The entry's files, the data mapped; see `MovesBytes`."""
        try:
            manifest_file, data_file = self._store.files_of(key_id)
            raw = manifest_file.read_bytes()
            manifest = layout.parse_manifest(raw)
            data = layout.map_file(data_file, manifest)
        except (OSError, ConfigError, Damaged) as error:
            raise CacheMiss(f"no usable entry {key_id[:12]} in {self._store.path}: {error}") from error
        return EntryBytes(key_id, raw, data, manifest.cost_seconds, manifest.expires)

    def import_bytes(self, entry: EntryBytes) -> None:
        """Write the entry's files, unless it has some; see `MovesBytes`."""
        try:
            self._store.put_bytes(entry.id, entry.manifest, [entry.data.numpy().data])
        except ConfigError as error:
            raise Damaged(str(error)) from error


def mover(store: object) -> MovesBytes | None:
    """What moves a store's entries as bytes; None if only their rows can be moved."""
    if isinstance(store, DiskStore):
        return DiskBytes(store)
    return store if isinstance(store, MovesBytes) else None

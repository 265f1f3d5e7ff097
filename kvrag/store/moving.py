"""Entries as bytes: how they go from tier to tier without being decoded.

What a codec, a compressor or a cipher has done to an entry stays done on the way: a copy is the same bytes
under the same name, and a tier needs neither keys nor codecs to hold it.
"""

from __future__ import annotations

import math
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash

from kvrag.errors import CacheMiss
from kvrag.store import layout
from kvrag.store.disk import DiskStore
from kvrag.store.files import PARTIAL, commit, exclusive, make_folder, remove, write_error, write_partial
from kvrag.store.key import EntryKey, Fingerprint
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
        prove_name(self.id, self.data, manifest)
        return manifest


def prove_name(key_id: str, data: torch.Tensor, manifest: Manifest) -> None:
    """Prove that an entry whose bytes are verified belongs to its name.

    Raises:
        Damaged: it belongs to another.
    """
    raw = layout.stored_tokens(data, manifest)
    tokens = tuple(int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4))
    fields: dict[str, Any] = dict(manifest.fingerprint)
    try:
        found = EntryKey(Fingerprint(**fields), tokens).id
    except TypeError as error:
        raise Damaged(f"the manifest has other fingerprint fields: {error}") from error
    if found != key_id:
        raise Damaged("the entry's content belongs to another name")


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
        """Keep an entry that was exported elsewhere; it replaces one of the same name.

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
    """Gives and takes the entries of a store on disk, by the format of docs/store-format.md.

    Args:
        store: whose folder it is.
    """

    def __init__(self, store: DiskStore) -> None:
        self.path: Path = store.path

    def export_bytes(self, key_id: str) -> EntryBytes:
        """The entry's files, the data mapped; see `MovesBytes`."""
        manifest_file, data_file = self._files(key_id)
        try:
            raw = manifest_file.read_bytes()
            manifest = layout.parse_manifest(raw)
            data = layout.map_file(data_file, manifest)
        except (OSError, Damaged) as error:
            raise CacheMiss(f"no usable entry {key_id[:12]} in {self.path}: {error}") from error
        times = (getattr(manifest, "cost_seconds", 0.0), getattr(manifest, "expires", None))
        return EntryBytes(key_id, raw, data, *times)

    def import_bytes(self, entry: EntryBytes) -> None:
        """Write the files so that a crash after the return does not lose them; see `MovesBytes`."""
        entry.verified()
        manifest_file, data_file = self._files(entry.id)
        stem = f"{entry.id}.{uuid.uuid4().hex}"
        data_part = data_file.with_name(f"{stem}.safetensors{PARTIAL}")
        manifest_part = data_file.with_name(f"{stem}.json{PARTIAL}")
        try:
            make_folder(data_file.parent)
            write_partial(data_part, [entry.data.numpy().data])
            write_partial(manifest_part, [entry.manifest])
            with exclusive(self.path / "store.lock"):
                manifest_file.unlink(missing_ok=True)  # must not meet the new data
                commit(data_part, data_file)
                commit(manifest_part, manifest_file)
        except OSError as error:
            raise write_error(error, self.path) from error
        finally:
            remove(data_part)
            remove(manifest_part)

    def _files(self, key_id: str) -> tuple[Path, Path]:
        folder = self.path / key_id[:2]
        return folder / f"{key_id}.json", folder / f"{key_id}.safetensors"


def mover(store: object) -> MovesBytes | None:
    """What moves a store's entries as bytes; None if only their rows can be moved."""
    if isinstance(store, DiskStore):
        return DiskBytes(store)
    return store if isinstance(store, MovesBytes) else None

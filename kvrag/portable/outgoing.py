"""A collection into one file: documents, vectors, settings and caches, streamed."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from kvrag.config import store_key
from kvrag.errors import CacheMiss, ConfigError, InputError
from kvrag.home import Home
from kvrag.index import Index, Record
from kvrag.lockstep import Progress
from kvrag.portable import signing
from kvrag.portable.archive import HEAD, MAX_JSON, Writer, entry_names, records_name
from kvrag.portable.sealing import OVERHEAD, Seal
from kvrag.store.disk import DiskStore
from kvrag.store.files import PARTIAL, remove, sync_folder
from kvrag.store.key import LAYOUT_VERSION
from kvrag.store.references import References

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT, VERSION, SEALED_VERSION = "kvrag portable collection", 1, 2
_PART_BYTES = 8 << 20
_MAX_LINE = MAX_JSON - OVERHEAD


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the file.
        num_bytes: its size.
        records: documents in it.
        entries: caches in it.
        uncached: documents without one.
        signer: the public key that vouches for it, as a line; None: it is not signed.
        sealed_with: name of the key that it is sealed with; None: everybody can read it.
    """

    path: str
    num_bytes: int
    records: int
    entries: int
    uncached: int
    signer: str | None
    sealed_with: str | None = None


def export_collection(
    home: Home,
    path: Path,
    *,
    key: Ed25519PrivateKey | None = None,
    seal_key: bytes | None = None,
    plain: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a collection and its caches into one file; memory does not grow with them.

    Nothing is encoded anew: a cache's bytes are copied as they lie, or sealed under another key. The file of
    an encrypted store is sealed with the store's own key (KVRAG_STORE_KEY) unless something else is said. The
    file gets its name once it is complete.

    Args:
        home: what to export.
        path: of the file.
        key: signs it.
        seal_key: 32 bytes: all of it is sealed with this key, whether the store is encrypted or not.
        plain: nothing is sealed, although the store is encrypted: whoever has the file can read it.
        replace: write over a file that is there.
        progress: told (caches done, caches in all).

    Raises:
        InputError: the file is there already, or cannot be written.
        ConfigError: the caches are encrypted and their key is not given, or is another one; a key for a
            plain file.
        CorpusLocked: another process is writing to the collection.
    """
    if plain and seal_key is not None:
        raise ConfigError("a file is either plain or sealed with a key; leave out one of the two")
    if path.exists() and not replace:
        raise InputError(f"{path} exists; choose another name, or add --force to write over it")
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            report = _write(home, path, file, key, seal_key, progress, plain=plain)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        remove(partial)
    return report


def _write(
    home: Home,
    path: Path,
    file: BinaryIO,
    key: Ed25519PrivateKey | None,
    seal_key: bytes | None,
    progress: Progress | None,
    *,
    plain: bool,
) -> ExportReport:
    settings, store, index = home.settings(), home.store(), home.index()
    references, writer = References(store.path / "references.sqlite"), Writer(file)
    try:
        seal = None if plain else _seal(store, seal_key)
        outlet = _Outlet(writer, store, seal)
        index.begin_writing()  # nobody adds or removes documents meanwhile
        outlet.head(_public_head(), _private_head(settings, index))
        named = references.of(index.id)
        records = uncached = 0
        for part, (raw, lines) in enumerate(_parts(index, named)):
            outlet.records(part, raw)
            records += lines
        wanted = sorted(set(named.values()))
        entries = 0
        for done, key_id in enumerate(wanted, start=1):
            entries += outlet.entry(key_id)
            if progress is not None:
                progress(done, len(wanted))
        uncached = records - sum(key_id in store for key_id in named.values())
        writer.finish(None if key is None else lambda digest: _signed(key, digest), seal and seal.seal)
    finally:
        writer.close()
        references.close()
        index.close()
        store.close()
    return ExportReport(
        str(path),
        writer.num_bytes,
        records,
        entries,
        max(0, uncached),
        None if key is None else signing.public_line(key),
        None if seal is None else seal.master.id,
    )


def _seal(store: DiskStore, key: bytes | None) -> Seal | None:
    """What the file is sealed with: the key given, else that of the store; None where neither is.

    Raises:
        ConfigError: the store is encrypted, and nobody has its key.
    """
    mine = store_key()
    if store.is_encrypted and mine is None:
        raise ConfigError(
            f"the caches in {store.path} are encrypted: to export them, set KVRAG_STORE_KEY to their key"
        )
    chosen = mine if key is None else key
    return None if chosen is None else Seal(chosen)


def _signed(key: Ed25519PrivateKey, digest: bytes) -> tuple[bytes, bytes]:
    return key.public_key().public_bytes_raw(), signing.sign(key, digest)


def _public_head() -> dict[str, Any]:
    """What everybody may know of the file."""
    return {"format": FORMAT, "version": VERSION, "layout": LAYOUT_VERSION, "created": time.time()}


def _private_head(settings: Any, index: Index) -> dict[str, Any]:
    """What a reader has to know before the documents come. The address of a server stays at home."""
    return {
        "collection": {"name": index.name, "embedding": index.embedding, "context": index.context},
        "settings": {
            "model": settings.model,
            "codec": settings.codec,
            "forms": {name: asdict(form) for name, form in settings.forms.items()},
        },
    }


class _Outlet:
    """Writes head, documents and caches, sealed if they are to be."""

    def __init__(self, writer: Writer, store: DiskStore, seal: Seal | None) -> None:
        self._writer, self._store, self._seal = writer, store, seal
        # Caches that lie under the file's key, or under none and need none, are copied.
        self._as_they_lie = (store_key() if store.is_encrypted else None) == (seal.raw if seal else None)

    def head(self, public: dict[str, Any], private: dict[str, Any]) -> None:
        head = {**public, **private}
        if self._seal is not None:
            head = self._seal.head({**public, "version": SEALED_VERSION}, private)
        self._writer.add(HEAD, json.dumps(head, ensure_ascii=False).encode())

    def records(self, part: int, raw: bytes) -> None:
        name = records_name(part, is_sealed=self._seal is not None)
        self._writer.add(name, raw if self._seal is None else self._seal.seal(raw, name))

    def entry(self, key_id: str) -> bool:
        """Write one cache; False if it is not there (never built, evicted) or not intact."""
        names = entry_names(key_id, is_sealed=self._seal is not None)
        if self._as_they_lie:
            return _copy_entry(self._writer, self._store, key_id, names)
        try:
            manifest, parts = self._store.under_key(key_id, self._seal.raw if self._seal else None)
        except CacheMiss:
            return False
        self._writer.add(names[0], manifest)
        self._writer.add(names[1], *parts)
        return True


def _parts(index: Index, named: dict[str, str]) -> Iterator[tuple[bytes, int]]:
    """Documents as lines of JSON, in parts of a few megabytes, with the number of lines."""
    lines: list[bytes] = []
    size = 0
    for record, vector in index.records_with_vectors():
        line = _line(record, vector, named.get(record.id))
        if lines and size + len(line) > _PART_BYTES:
            yield b"".join(lines), len(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield b"".join(lines), len(lines)


def _line(record: Record, vector: np.ndarray[Any, Any] | None, entry: str | None) -> bytes:
    fields = {
        "id": record.id,
        "text": record.text,
        "metadata": record.metadata,
        "embedding": None if vector is None else encode_vector(vector),
        "entry": entry,
    }
    line = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    if len(line) > _MAX_LINE:
        raise InputError(
            f"the document {record.id!r} has {len(line)} bytes; at most {_MAX_LINE} are exported"
        )
    return line


def encode_vector(vector: np.ndarray[Any, Any]) -> str:
    """A vector's bits, float32, in base64: exact, and a quarter of the size of decimal digits."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def _copy_entry(writer: Writer, store: DiskStore, key_id: str, names: tuple[str, str]) -> bool:
    """Copy the files of a cache; False if it is not there, or not intact."""
    opened: list[BinaryIO] = []
    with suppress(FileNotFoundError):
        try:
            if key_id not in store or store.damage(key_id) is not None:
                return False
            opened += (path.open("rb") for path in store.files_of(key_id))
            # Both are open: what is deleted or replaced from now on changes no byte of them.
            for name, file in zip(names, opened, strict=True):
                writer.add_file(name, file, os.fstat(file.fileno()).st_size)
            return True
        finally:
            for file in opened:
                file.close()
    return False

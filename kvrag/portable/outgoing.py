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

from kvrag.errors import ConfigError, InputError
from kvrag.home import Home
from kvrag.index import Index, Record
from kvrag.lockstep import Progress
from kvrag.portable import signing
from kvrag.portable.archive import HEAD, MAX_JSON, Writer, entry_names, records_name
from kvrag.store.disk import DiskStore
from kvrag.store.files import PARTIAL, remove, sync_folder
from kvrag.store.key import LAYOUT_VERSION
from kvrag.store.references import References

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT, VERSION = "kvrag portable collection", 1
_PART_BYTES = 8 << 20


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
    """

    path: str
    num_bytes: int
    records: int
    entries: int
    uncached: int
    signer: str | None


def export_collection(
    home: Home,
    path: Path,
    *,
    key: Ed25519PrivateKey | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a collection and its caches into one file; memory does not grow with them.

    Nothing is encoded anew: a cache's bytes are copied as they lie. The file gets its name once it is
    complete.

    Args:
        home: what to export.
        path: of the file.
        key: signs it.
        replace: write over a file that is there.
        progress: told (caches done, caches in all).

    Raises:
        InputError: the file is there already, or cannot be written.
        ConfigError: the caches are encrypted: the file would be of no use elsewhere.
        CorpusLocked: another process is writing to the collection.
    """
    if path.exists() and not replace:
        raise InputError(f"{path} exists; choose another name, or add --force to write over it")
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            report = _write(home, path, file, key, progress)
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
    home: Home, path: Path, file: BinaryIO, key: Ed25519PrivateKey | None, progress: Progress | None
) -> ExportReport:
    settings, store, index = home.settings(), home.store(), home.index()
    if store.is_encrypted:
        raise ConfigError(
            f"the caches in {store.path} are encrypted, and an export has the texts in the clear: copy the "
            "folder as it is, or ingest the documents elsewhere"
        )
    references, writer = References(store.path / "references.sqlite"), Writer(file)
    try:
        index.begin_writing()  # nobody adds or removes documents meanwhile
        writer.add(HEAD, json.dumps(_head(settings, index), ensure_ascii=False).encode())
        named = references.of(index.id)
        records = uncached = 0
        for part, (raw, lines) in enumerate(_parts(index, named)):
            writer.add(records_name(part), raw)
            records += lines
        wanted = sorted(set(named.values()))
        entries = 0
        for done, key_id in enumerate(wanted, start=1):
            entries += _add_entry(writer, store, key_id)
            if progress is not None:
                progress(done, len(wanted))
        uncached = records - sum(key_id in store for key_id in named.values())
        writer.finish(None if key is None else lambda digest: _signed(key, digest))
    finally:
        writer.close()
        references.close()
        index.close()
        store.close()
    signer = None if key is None else signing.public_line(key)
    return ExportReport(str(path), writer.num_bytes, records, entries, max(0, uncached), signer)


def _signed(key: Ed25519PrivateKey, digest: bytes) -> tuple[bytes, bytes]:
    return key.public_key().public_bytes_raw(), signing.sign(key, digest)


def _head(settings: Any, index: Index) -> dict[str, Any]:
    """What a reader has to know before the documents come. The address of a server stays at home."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "layout": LAYOUT_VERSION,
        "created": time.time(),
        "collection": {"name": index.name, "embedding": index.embedding, "context": index.context},
        "settings": {
            "model": settings.model,
            "codec": settings.codec,
            "forms": {name: asdict(form) for name, form in settings.forms.items()},
        },
    }


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
    if len(line) > MAX_JSON:
        raise InputError(f"the document {record.id!r} has {len(line)} bytes; at most {MAX_JSON} are exported")
    return line


def encode_vector(vector: np.ndarray[Any, Any]) -> str:
    """A vector's bits, float32, in base64: exact, and a quarter of the size of decimal digits."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def _add_entry(writer: Writer, store: DiskStore, key_id: str) -> bool:
    """Copy one cache; False if it is not there (never built, evicted) or not intact."""
    opened: list[BinaryIO] = []
    with suppress(FileNotFoundError):
        try:
            if key_id not in store or store.damage(key_id) is not None:
                return False
            opened += (path.open("rb") for path in store.files_of(key_id))
            # Both are open: what is deleted or replaced from now on changes no byte of them.
            for name, file in zip(entry_names(key_id), opened, strict=True):
                writer.add_file(name, file, os.fstat(file.fileno()).st_size)
            return True
        finally:
            for file in opened:
                file.close()
    return False

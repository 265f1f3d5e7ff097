"""The first half of an import: everything is read once and proven, in a folder of its own."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvrag.chroma_rows import Record
from kvrag.config import Context
from kvrag.errors import CacheMiss, InputError
from kvrag.home import Home, Settings
from kvrag.index import Index, Vector
from kvrag.lockstep import Progress, batches
from kvrag.portable.archive import HEAD, MANIFEST, Archive, Member, parse, rank
from kvrag.portable.outgoing import FORMAT, SEALED_VERSION, VERSION
from kvrag.portable.sealing import Seal, needed
from kvrag.prompt import RagPrompt
from kvrag.store.codec import codec_named
from kvrag.store.damage import Damaged
from kvrag.store.disk import DiskStore
from kvrag.store.files import PARTIAL, try_lock, write_error
from kvrag.store.filters import Filters
from kvrag.store.key import LAYOUT_VERSION, Fingerprint
from kvrag.store.manifest import parse_manifest, reveal
from kvrag.store.sealing import CIPHER, MasterKey

_BATCH = 256
_LONGEST_NAME = 4096
_PREFIX, _LOCK = "import-", "import.lock"

Row = tuple[Record, Vector | None, str | None]
"""A document, its vector, and the name of its cache."""


@dataclass(slots=True)
class Staged:
    """What was proven, in a folder of its own, sealed as it was in the file."""

    folder: Path
    store: DiskStore
    settings: Settings
    embedding: dict[str, Any]
    context: str | None
    seal: Seal | None = None
    parts: list[tuple[str, Path]] = field(default_factory=list)
    records: int = 0
    dimension: int | None = None
    entries: set[str] = field(default_factory=set)
    skipped: int = 0
    unusable: int = 0
    made_by: Counter[str] = field(default_factory=Counter)


@contextmanager
def staging_folder(home: Home, entry_bytes: int) -> Iterator[Path]:
    """An empty folder beside the store, so that what was proven can be moved instead of copied.

    Raises:
        InputError: caches of so many bytes do not fit on the disk.
        StoreWriteError: the folder cannot be made.
    """
    try:
        home.path.mkdir(parents=True, exist_ok=True)
        remove_abandoned(home)
        free = shutil.disk_usage(home.path).free
        if free < entry_bytes:
            raise InputError(
                f"the caches need {entry_bytes} bytes and {home.path} has {free} free; nothing was changed"
            )
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=PARTIAL, dir=home.path))
    except OSError as error:
        raise write_error(error, home.path) from error
    lock = try_lock(folder / _LOCK)  # tells others that this import is alive
    try:
        yield folder
    finally:
        _release(lock)
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(home: Home) -> list[Path]:
    """Folders that killed imports left behind."""
    found = []
    for folder in home.path.glob(f"{_PREFIX}*{PARTIAL}"):
        with suppress(OSError):
            lock = try_lock(folder / _LOCK)
            if lock is not None:
                found.append(folder)
            _release(lock)
    return found


def remove_abandoned(home: Home) -> None:
    """Remove what killed imports left behind."""
    for folder in abandoned(home):
        shutil.rmtree(folder, ignore_errors=True)


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def stage(
    archive: Archive,
    folder: Path,
    usable_by: Fingerprint | None,
    *,
    usable_only: bool,
    seal_key: bytes | None,
    progress: Progress | None,
) -> Staged:
    """Read the file once, from its beginning to its end, and prove all of it."""
    staged: Staged | None = None
    seen: set[bytes] = set()
    is_wanted = True
    for member, pieces in archive.members():
        kind = (rank(member.name) or (0,))[0]
        if member.name == HEAD:
            staged = _head(archive, folder, archive.whole(member, pieces), seal_key)
        elif staged is None:
            raise archive.refuse("it does not begin with its head")
        elif member.name.endswith((".jsonl", ".safetensors") if staged.seal else ".sealed"):
            raise archive.refuse(f"its head says that {member.name} is of another form")
        elif kind == 1:
            raw = archive.whole(member, pieces)
            _check_records(archive, _opened(archive, staged, raw, member.name), staged, seen)
            part = folder / f"{len(staged.parts):06}"
            part.write_bytes(raw)
            staged.parts.append((member.name, part))
        elif member.name.endswith(".json"):
            raw = archive.whole(member, pieces)
            is_wanted = _judge(archive, member, raw, staged, usable_by, usable_only=usable_only)
            if is_wanted:
                _save(staged.store, member, iter([raw]))
        elif is_wanted:
            _save(staged.store, member, pieces)
            _prove(archive, staged, member)
        else:
            for _ in pieces:  # still to be proven
                pass
        if progress is not None:
            progress(member.after, archive.num_bytes)
    if staged is None:
        raise archive.refuse("it is empty")
    return staged


def _head(archive: Archive, folder: Path, raw: bytes, seal_key: bytes | None) -> Staged:
    fields = parse(raw, lambda: archive.refuse("its head is not of the expected form"))
    if fields.get("format") != FORMAT or fields.get("version") not in (VERSION, SEALED_VERSION):
        raise archive.refuse(
            f"it says it is {fields.get('format')!r}, version {fields.get('version')!r}; this kvrag reads "
            f"{FORMAT!r}, versions {VERSION} and {SEALED_VERSION}"
        )
    seal = _seal(archive, fields, seal_key)
    try:
        if seal is not None:
            fields = seal.private(fields)
        given, collection = fields["settings"], fields["collection"]
        forms = {str(name)[:_LONGEST_NAME]: _form(form) for name, form in given["forms"].items()}
        settings = Settings(_text(given["model"]), forms, codec=codec_named(_text(given["codec"])).name)
        embedding, context = dict(collection["embedding"]), _context(collection["context"])
    except Damaged as damage:
        raise archive.refuse(str(damage)) from damage
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # also ConfigError, of the codec
        raise archive.refuse(f"its head lacks or misspells {error}") from error
    store = DiskStore(folder / "store", keep_bytes=0, key=seal.raw if seal else None)
    return Staged(folder, store, settings, embedding, context, seal)


def _seal(archive: Archive, head: dict[str, Any], key: bytes | None) -> Seal | None:
    """What opens the file, proven to be what sealed its list of members; None: the file is plain."""
    if head["version"] == VERSION:
        if archive.seal() is not None:
            raise archive.refuse("it is sealed and its head does not say so")
        return None
    if archive.seal() is None:
        raise archive.refuse("its head says that it is sealed, and its list of members is not")
    if key is None:
        raise archive.refuse(f"it is sealed with the key {needed(head)}, and none was given; add --key")
    try:
        seal = Seal.of(head, key)
    except (KeyError, TypeError, ValueError) as error:
        raise archive.refuse(f"its head lacks or misspells {error}") from error
    if seal is None:
        raise archive.refuse(
            f"it is sealed with the key {needed(head)}, given was {MasterKey(key).id[:8]}; name its key "
            "with --key"
        )
    try:
        if seal.open(archive.seal() or b"", MANIFEST) != archive.digest():
            raise archive.refuse("its list of members was changed after it was sealed")
    except Damaged as damage:
        raise archive.refuse(f"its list of members was not sealed with its key: {damage}") from damage
    return seal


def _opened(archive: Archive, staged: Staged, raw: bytes, name: str) -> bytes:
    """The documents in a member."""
    if staged.seal is None:
        return raw
    try:
        return staged.seal.open(raw, name)
    except Damaged as damage:
        raise archive.refuse(str(damage)) from damage


def _context(value: Any) -> str | None:
    return None if value is None else str(Context.parse(_text(value)))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError("a name")
    return value


def _form(fields: dict[str, Any]) -> RagPrompt:
    form = RagPrompt(**fields)
    texts = (form.prefix, form.middle, form.suffix, form.separator)
    if not all(isinstance(text, str) for text in texts) or not isinstance(form.is_rendered, bool):
        raise ValueError("a form of prompts")
    return form


def _check_records(archive: Archive, raw: bytes, staged: Staged, seen: set[bytes]) -> None:
    for record, vector, _ in _records(archive, raw):
        digest = hashlib.blake2b(record.id.encode(), digest_size=16).digest()
        if digest in seen:
            raise archive.refuse(f"the document {record.id!r} comes twice")
        seen.add(digest)
        staged.records += 1
        if vector is not None and staged.dimension not in (None, len(vector)):
            raise archive.refuse("its vectors have several lengths")
        staged.dimension = staged.dimension if vector is None else len(vector)


def _records(archive: Archive, raw: bytes) -> Iterator[Row]:
    """Documents, their vectors and the names of their caches."""
    for line in raw.split(b"\n")[:-1]:
        fields = parse(line, lambda: archive.refuse("a document is not of the expected form"))
        try:
            yield _row(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise archive.refuse(f"a document lacks or misspells {error}") from error


def _row(fields: dict[str, Any]) -> Row:
    record = Record(fields["id"], fields["text"], fields["metadata"])
    vector, entry = _vector(fields["embedding"]), fields["entry"]
    texts = (record.id, record.text, "" if entry is None else entry)
    if not all(isinstance(text, str) for text in texts) or not record.id:
        raise ValueError("texts")
    "".join(texts).encode()  # refuses lone surrogates
    if entry is not None and (rank(f"entries/{entry}.json") or (0,))[0] != 2:
        raise ValueError("entry")
    metadata = record.metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str | int | float) for v in metadata.values()):
        raise ValueError("metadata")
    Index.check_records([record.id], [record.text], [metadata])
    return record, vector, entry


def _vector(text: Any) -> Vector | None:
    if text is None:
        return None
    vector = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    if not 0 < len(vector) <= 1 << 16 or not np.isfinite(vector).all():
        raise ValueError("an embedding")
    return vector


def _judge(
    archive: Archive,
    member: Member,
    raw: bytes,
    staged: Staged,
    usable_by: Fingerprint | None,
    *,
    usable_only: bool,
) -> bool:
    """Whether to keep a cache, by its manifest; what it says is proven once its rows are there."""
    fields = parse(raw, lambda: archive.refuse(f"{member.name} is no manifest")).get("fingerprint")
    if not isinstance(fields, dict):
        raise archive.refuse(f"{member.name} is no manifest")
    if fields.get("layout") != LAYOUT_VERSION:
        staged.skipped += 1
        return False
    fields = _revealed(archive, member, raw, staged.seal) or fields
    if usable_by is not None:
        ours = usable_by.fields()
        if any(fields.get(name) != ours[name] for name in ("model", "tokenizer", "rope", "dtype")):
            staged.unusable += not usable_only
            staged.skipped += usable_only
            if usable_only:
                return False
    staged.made_by[f"{str(fields.get('model'))[:12]} {str(fields.get('dtype'))[:20]}"] += 1
    return True


def _revealed(archive: Archive, member: Member, raw: bytes, seal: Seal | None) -> dict[str, Any] | None:
    """The fingerprint in a sealed manifest; None: the manifest is not sealed, and is proven with its rows."""
    if seal is None:
        filters = parse(raw, lambda: archive.refuse(f"{member.name} is no manifest")).get("filters")
        if isinstance(filters, list) and CIPHER in filters:
            raise archive.refuse(f"{member.name} is encrypted, and its head does not say so")
        return None
    try:
        manifest = parse_manifest(raw)
        if CIPHER in manifest.filters and seal.master.is_called(manifest.key_id):
            return dict(reveal(manifest, Filters(key=seal.raw))[0].fingerprint)
        why = "it was not sealed with the file's key"
    except Damaged as damage:
        why = str(damage)
    raise archive.refuse(f"{member.name} is no manifest of this file: {why}")


def _save(store: DiskStore, member: Member, pieces: Iterator[bytes]) -> None:
    place = rank(member.name)
    assert place is not None
    file = store.files_of(place[1])[place[2]]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as out:
            for piece in pieces:
                out.write(piece)
    except OSError as error:
        raise write_error(error, store.path) from error


def _prove(archive: Archive, staged: Staged, member: Member) -> None:
    """A cache as the store proves its own: sizes, every checksum, and that its content gives its name."""
    key_id = (rank(member.name) or (0, ""))[1]
    try:
        damage = staged.store.damage(key_id)
    except CacheMiss as error:
        damage = str(error)
    if damage is not None:
        raise archive.refuse(f"the cache {key_id[:12]} is not what it says: {damage}")
    staged.entries.add(key_id)


def rows(staged: Staged, archive: Archive) -> Iterator[Sequence[Row]]:
    """The proven documents, in batches."""
    for name, part in staged.parts:
        raw = _opened(archive, staged, part.read_bytes(), name)
        yield from batches(list(_records(archive, raw)), _BATCH)

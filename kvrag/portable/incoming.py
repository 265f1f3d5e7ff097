"""A collection out of one file: everything is proven in a folder of its own before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from kvrag.config import store_key
from kvrag.embedding import HashedEmbedding
from kvrag.errors import ConfigError, InputError
from kvrag.home import Home
from kvrag.index import Index
from kvrag.lockstep import Progress
from kvrag.portable import signing
from kvrag.portable.archive import Archive
from kvrag.portable.staging import Row, Staged, rows, stage, staging_folder
from kvrag.store.disk import DiskStore
from kvrag.store.key import Fingerprint
from kvrag.store.references import References

_HASHED = HashedEmbedding.name()


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import brought.

    Attributes:
        records: documents in the file.
        added: documents that were not there.
        replaced: documents that were there with another text.
        entries: caches that were not there.
        known: caches that were.
        skipped: caches that nothing here could ever use: of another layout of files or, if a model was
            named and this asked for, of another model.
        unusable: caches that were imported and that the named model cannot use.
        made_by: for each kind of cache, model digest and dtype, how many there are.
        model: the model that the collection was made with.
        signer: the public key that vouches for the file; None: nobody does.
        sealed_with: name of the key that the file is sealed with; None: everybody can read it.
    """

    records: int
    added: int
    replaced: int
    entries: int
    known: int
    skipped: int
    unusable: int
    made_by: dict[str, int]
    model: str
    signer: str | None
    sealed_with: str | None = None


def import_collection(
    home: Home,
    path: Path,
    *,
    trust: Collection[bytes] = (),
    allow_unsigned: bool = False,
    seal_key: bytes | None = None,
    replace: bool = False,
    usable_by: Fingerprint | None = None,
    usable_only: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Bring the documents and caches of a file into a folder's collection.

    Everything is proven first: form, signature, every digest, every cache as the store would prove it. Then
    changes go in the corpus's order (reference, entry, Chroma), so that an interrupted import can be
    repeated, and a repeated one changes nothing. Caches become what the store here is: sealed with its key
    (KVRAG_STORE_KEY), or open.

    Args:
        home: where to; it may be empty.
        path: the file.
        trust: public keys, 32 bytes each; a signed file has to be signed by one of them.
        allow_unsigned: take a file that nobody signed. Its caches are proven to be whole, not to be true: who
            made it decides what a model takes its documents to say.
        seal_key: 32 bytes that the file is sealed with; None: the key of the store here.
        replace: documents that are here with another text under the same id get the file's.
        usable_by: what caches of the model here depend on, for the report.
        usable_only: leave out caches that `usable_by` says cannot be used.
        progress: told (bytes proven, bytes in all).

    Raises:
        InputError: the file cannot be read, was refused (nothing was changed), or does not fit the
            collection that is here (the same). A sealed file is refused without its key.
        ConfigError: the store here is encrypted, and its key is not given, or is another one.
        CorpusLocked: another process is writing; nothing was changed.
        StoreWriteError: the disk is full or read-only; run the same command again later.
    """
    archive, was_there = Archive(path), home.path.exists()
    try:
        key = _store_key(home)
        signer = _check_signer(archive, trust, allow_unsigned=allow_unsigned)
        with staging_folder(home, archive.entry_bytes) as folder:
            staged = stage(
                archive,
                folder,
                usable_by,
                usable_only=usable_only,
                seal_key=key if seal_key is None else seal_key,
                progress=progress,
            )
            if staged.seal is None and seal_key is not None:
                raise archive.refuse("it is not sealed, and a key was given; leave out --key to take it")
            added, replaced, entries = _commit(home, staged, archive, replace=replace)
    finally:
        archive.close()
        with suppress(OSError):
            if not was_there:
                home.path.rmdir()  # only if it is empty, because nothing came of it
    return ImportReport(
        records=staged.records,
        added=added,
        replaced=replaced,
        entries=entries,
        known=len(staged.entries) - entries,
        skipped=staged.skipped,
        unusable=staged.unusable,
        made_by=dict(staged.made_by),
        model=staged.settings.model,
        signer=None if signer is None else signing.line_of(signer),
        sealed_with=None if staged.seal is None else staged.seal.master.id,
    )


def _store_key(home: Home) -> bytes | None:
    """The key of the store here; None: it is not encrypted.

    Raises:
        ConfigError: it is, and its key is not given, or is another one.
    """
    key = store_key()
    with closing(home.store()) as store:
        if store.is_encrypted and key is None:
            raise ConfigError(
                f"the caches in {store.path} are encrypted: to import into them, set KVRAG_STORE_KEY to "
                "their key; nothing was changed"
            )
    return key


def _check_signer(archive: Archive, trust: Collection[bytes], *, allow_unsigned: bool) -> bytes | None:
    signer = archive.signer()
    if signer is None:
        if not allow_unsigned:
            raise archive.refuse(
                "it is not signed; if you know where it comes from, add --allow-unsigned, or have it "
                "exported with --sign"
            )
    elif signer not in trust:
        raise archive.refuse(
            f"it is signed by {signing.line_of(signer)}, which is not trusted here; if that is the right "
            "key, add it with --trust"
        )
    return signer


def _commit(home: Home, staged: Staged, archive: Archive, *, replace: bool) -> tuple[int, int, int]:
    """Documents added and replaced, and caches added."""
    index = _open_index(home, staged)
    store = home.store()
    references = References(store.path / "references.sqlite")
    try:
        index.begin_writing()
        changed, replaced = _differences(index, staged, archive)
        if replaced and index.context not in (None, "alone"):
            raise InputError(
                f"{len(replaced)} documents are here with another text, such as {min(replaced)!r}, and "
                "others may be encoded behind them; remove them first (kvrag rm); nothing was changed"
            )
        if replaced and not replace:
            raise InputError(
                f"{len(replaced)} documents are here with another text, such as {min(replaced)!r}; add "
                "--replace to take the file's, or import into another --collection; nothing was changed"
            )
        entries = added = 0
        for batch in _changes(staged, archive, changed):
            freed = references.add(
                index.id, {r.id: e for r, _, e in batch if e and (e in staged.entries or e in store)}
            )
            wanted = {e for _, _, e in batch if e in staged.entries and e not in store}
            entries += sum(store.adopt(staged.store, key_id) for key_id in sorted(wanted))
            index.add_with_vectors([r for r, _, _ in batch], [v for _, v, _ in batch])
            references.collect(freed, store.delete)
            added += sum(r.id not in replaced for r, _, _ in batch)
        entries += _complete(index, staged, archive, store, references)
        _settle(home, index, staged)
    finally:
        references.close()
        store.close()
        index.close()
    return added, len(replaced), entries


def _open_index(home: Home, staged: Staged) -> Index:
    """The collection; a new one only with kvrag's own embedding.

    The name of an embedding is a piece of code, and its settings an address or a path: a file is not to
    choose them.
    """
    name = staged.embedding.get("name")
    if not home.has_collection():
        if name != _HASHED:
            raise InputError(
                f"the collection was made with the embedding {str(name)[:80]!r}; create one with it here "
                "first, with Index.open(folder, collection, embedding=...), and import into that; nothing "
                "was changed"
            )
        try:
            return home.index(embedding=HashedEmbedding.build_from_config(staged.embedding["config"]))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the file's embedding has impossible settings: {error}; nothing was changed"
            ) from error
    index = home.index()
    ours = index.embedding
    if (ours["name"], ours["config"]) != (name, staged.embedding.get("config")):
        index.close()
        raise InputError(
            f"the collection here has the embedding {ours['name']!r}, the file's {str(name)[:80]!r} or other "
            "settings of it; import into another --collection; nothing was changed"
        )
    if index.context != staged.context and index.count():
        context = index.context or "alone"
        index.close()
        raise InputError(
            f"the chunks here are encoded by the rule {context}, the file's by {staged.context or 'alone'}; "
            "import into another --collection; nothing was changed"
        )
    return index


def _differences(index: Index, staged: Staged, archive: Archive) -> tuple[set[str], set[str]]:
    """Ids of documents that are not here or differ, and of those that are here with another text."""
    changed, replaced = set(), set()
    known = next((v for _, v in index.records_with_vectors() if v is not None), None)
    if known is not None and staged.dimension not in (None, len(known)):
        raise archive.refuse(
            f"its vectors have length {staged.dimension}, those of the collection {len(known)}"
        )
    for batch in rows(staged, archive):
        here = {record.id: record for record in index.get([r.id for r, _, _ in batch])}
        for record, _, _ in batch:
            ours = here.get(record.id)
            if ours is None or ours.text != record.text:
                changed.add(record.id)
            if ours is not None and ours.text != record.text:
                replaced.add(record.id)
    return changed, replaced


def _changes(staged: Staged, archive: Archive, changed: set[str]) -> Iterator[list[Row]]:
    for batch in rows(staged, archive):
        if some := [row for row in batch if row[0].id in changed]:
            yield some


def _complete(
    index: Index, staged: Staged, archive: Archive, store: DiskStore, references: References
) -> int:
    """Caches of documents that were here without one, or whose import was interrupted."""
    added, named = 0, references.of(index.id)
    for batch in rows(staged, archive):
        for record, _, entry in batch:
            if entry not in staged.entries or entry is None or entry in store:
                continue
            if named.get(record.id, entry) in store and named.get(record.id) != entry:
                continue  # it has one of the model here
            references.collect(references.add(index.id, {record.id: entry}), store.delete)
            added += store.adopt(staged.store, entry)
    return added


def _settle(home: Home, index: Index, staged: Staged) -> None:
    """What chunks are encoded behind, and the settings where there are none yet."""
    if staged.context is not None and staged.context != index.context:
        index.note_context(staged.context)
    home.take_over(staged.settings)

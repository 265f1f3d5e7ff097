"""Another key for what chats have said, or the first one; `kvrag.store.rekey` is for the rows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from kvrag.archive.archive import COLLECTION
from kvrag.archive.sealing import KEY_ID, RecordSeal, label_of
from kvrag.chroma_rows import Record
from kvrag.collection import Embedding
from kvrag.errors import ConfigError, InputError
from kvrag.index import Index, Vector
from kvrag.store.damage import Damaged
from kvrag.store.sealing import MasterKey
from kvrag.stores import KEY_VERSION

_BATCH = 1000


def rekey_archive(
    path_or_url: str | Path,
    old: bytes | None,
    new: bytes | None,
    *,
    collection: str = COLLECTION,
    embedding: Embedding | None = None,
    label: str = "",
) -> int:
    """Encrypt the texts of an archive under a new key; the number of records that were.

    Interrupted, it goes on where it was when it is run again with the same keys. Records that are damaged
    stay as they are. What Chroma's file still holds of the old ones is overwritten.

    Args:
        path_or_url: see `Archive.open`.
        old: the key that they are encrypted with; None: they are not.
        new: the key that they are to be encrypted with; None: none.
        collection: its name.
        embedding: see `Archive.open`.
        label: of the tenant whose archive it is, `Tenant.label`, where it is not encrypted yet.

    Raises:
        ConfigError: it is encrypted with a third key, or both keys are the same.
        CorpusLocked: another process is writing.
        InputError: there is no such archive.
    """
    if old == new:
        raise ConfigError("the new key is the old one")
    if not Index.exists(path_or_url, collection):
        raise InputError(f"there is no archive {collection!r} at {path_or_url}")
    keys = [None if raw is None else MasterKey(raw, KEY_VERSION) for raw in (old, new)]
    with closing(Index.open(path_or_url, collection, embedding=embedding)) as index:
        index.begin_writing()
        # All of them first: pages of a collection that is written to may skip some.
        left = [
            (record, vector)
            for record, vector in index.records_with_vectors()
            if str(record.metadata.get(KEY_ID) or "") != ("" if keys[1] is None else keys[1].id)
        ]
        done = 0
        for start in range(0, len(left), _BATCH):
            done += _renew(index, left[start : start + _BATCH], keys[0], keys[1], label)
        if done:
            index.forget()
    return done


def _renew(
    index: Index,
    some: list[tuple[Record, Vector | None]],
    old: MasterKey | None,
    new: MasterKey | None,
    label: str,
) -> int:
    """Write some records anew; how many."""
    renewed: list[Record] = []
    vectors: list[Vector | None] = []
    for record, vector in some:
        owner = label_of(record.metadata) or label
        before, after = RecordSeal(old, owner), RecordSeal(new, owner)
        try:
            text, metadata = before.open(record.id, record.text, record.metadata)
        except Damaged:
            continue
        # Ids of records begin with their chat's digest.
        digest = record.id.rpartition("-")[0]
        plain = {name: value for name, value in metadata.items() if name not in (KEY_ID, "tenant")}
        renewed.append(Record(record.id, *after.shut(record.id, text, plain, digest=digest)))
        vectors.append(vector)
    index.add_with_vectors(renewed, vectors)
    return len(renewed)

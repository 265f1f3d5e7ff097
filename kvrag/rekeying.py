"""Another key for everything that a folder keeps encrypted: conversations, what they said, caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvrag.archive.rekey import rekey_archive
from kvrag.collection import Embedding
from kvrag.errors import ConfigError
from kvrag.home import Home
from kvrag.sessions.rekey import rekey_sessions
from kvrag.store.filters import Filters, read_note
from kvrag.store.folder import EntryFolder
from kvrag.store.rekey import rekey
from kvrag.store.sealing import MasterKey


@dataclass(frozen=True, slots=True)
class Renewed:
    """What is under the new key now and was not before.

    Attributes:
        entries: caches of the store.
        sessions: saved conversations.
        spans: records of their archives.
    """

    entries: int
    sessions: int
    spans: int


def rekey_home(
    home: Home,
    old: bytes,
    new: bytes,
    *,
    embedding: Embedding | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Renewed:
    """Encrypt everything in a folder under a new key, all tenants' and all collections'.

    Whoever has the folder open has to close it first. Interrupted, it goes on where it was when it is run
    again with the same keys; until then neither key opens all of it.

    Args:
        home: the folder.
        old: the key of now, 32 bytes.
        new: the one that it is to have, 32 bytes.
        embedding: of the archives; None: the one that each was made with, if it is known here.
        progress: called with the number of caches so far, and that of all.

    Raises:
        ConfigError: the caches are not encrypted, or with a third key, or both keys are the same: nothing was
            changed then. An archive is encrypted with a third key, or has an embedding that is not known.
        SessionError: a process has one of the conversations.
        SessionSealed: a conversation is encrypted with a third key.
        CorpusLocked: a process writes to the archives.
        StoreWriteError: a file cannot be written.
    """
    store = home.path / "store"
    is_left = _is_left(store, old, new)
    database, names = home.sealed_archives()
    spans = sum(rekey_archive(database, old, new, collection=name, embedding=embedding) for name in names)
    sessions = rekey_sessions(home.sessions, old, new)
    # Last, because a store under the new key says that all is.
    return Renewed(_entries(store, old, new, progress) if is_left else 0, sessions, spans)


def _entries(store: Path, old: bytes, new: bytes, progress: Callable[[int, int], object] | None) -> int:
    """The store's part."""
    if progress is None:
        return rekey(store, old, new)
    total = sum(1 for _ in EntryFolder(store, Filters()).ids())
    return rekey(store, old, new, progress=lambda done: progress(done, total))


def _is_left(store: Path, old: bytes, new: bytes) -> bool:
    """Whether the store is still to be encrypted anew; keys that are not its own are refused."""
    if old == new:
        raise ConfigError("the new key is the old one")
    note = read_note(store) if store.is_dir() else None
    if note is None and not any(store.glob("??/*")):
        return False
    if note is None:
        raise ConfigError(
            f"the caches in {store} are not encrypted; only a new store can be: set KVRAG_STORE_KEY and "
            "ingest the documents into another folder"
        )
    before, after = (MasterKey(raw).id for raw in (old, new))
    if (note.key_id, note.previous) not in ((before, ""), (after, before), (after, "")):
        raise ConfigError(
            f"the caches in {store} are encrypted with the key {note.key_id[:8]}, and neither {before[:8]} "
            f"(of now) nor {after[:8]} (the new one) is that"
        )
    return note.key_id == before or bool(note.previous)

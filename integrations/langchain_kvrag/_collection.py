"""A Chroma collection whose writes take the caches along, in the place of langchain-chroma's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from chromadb.api import ClientAPI
from chromadb.errors import DuplicateIDError

from kvrag.companion import Companion
from kvrag.database import FolderDatabase
from kvrag.ingested import Ingested

_PAGE = 1000


class Access(Protocol):
    """How the collection's client is come by."""

    def reading(self) -> AbstractContextManager[ClientAPI]:
        """The client, seeing all that was written so far."""
        ...

    def writing(self) -> AbstractContextManager[ClientAPI]:
        """The client, for one change."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class FolderAccess:
    """A folder, written to by one process at a time; others see the changes."""

    def __init__(self, database: FolderDatabase) -> None:
        """Use an open database."""
        self._database = database

    def reading(self) -> AbstractContextManager[ClientAPI]:
        """The client."""
        return self._database.reading()

    @contextmanager
    def writing(self) -> Iterator[ClientAPI]:
        """The client; other processes cannot write meanwhile.

        Raises:
            CorpusLocked: another process is writing.
        """
        self._database.begin_writing()
        try:
            with self._database.writing() as client:
                yield client
        finally:
            self._database.end_writing()

    def close(self) -> None:
        """Let go of the folder."""
        self._database.close()


class ClientAccess:
    """A client of the caller's, or of a server: locking is somebody else's matter."""

    def __init__(self, client: ClientAPI) -> None:
        """Use a client."""
        self._client = client

    @contextmanager
    def reading(self) -> Iterator[ClientAPI]:
        """The client."""
        yield self._client

    writing = reading

    def close(self) -> None:
        """The client stays open."""


class CachedCollection:
    """The collection with this name; every change goes to the caches, too. May be used from any thread."""

    def __init__(
        self,
        access: Access,
        name: str,
        known: Ingested,
        companion: Callable[[str], Companion | None],
        *,
        lock: threading.RLock,
        retrieved: Callable[[Sequence[str]], None],
    ) -> None:
        """Stand in for a collection.

        Args:
            access: to its client.
            name: its name.
            known: where texts are told to.
            companion: gives the caches of the collection with an id; None: there are none.
            lock: held while the collection and its caches are changed; one for all who do it.
            retrieved: told the texts that a search found.
        """
        self._access, self._name, self._known = access, name, known
        self._companion, self._retrieved = companion, retrieved
        self._lock = lock

    def __getattr__(self, name: str) -> Any:
        """What changes nothing is the collection's own."""
        if name.startswith("__"):
            raise AttributeError(name)
        with self._reading() as collection:
            return getattr(collection, name)

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._access.reading() as client:
            yield client.get_collection(self._name, embedding_function=None)

    @contextmanager
    def _writing(self) -> Iterator[tuple[Any, Companion | None, int]]:
        with self._lock, self._access.writing() as client:
            collection = client.get_collection(self._name, embedding_function=None)
            yield collection, self._companion(str(collection.id)), client.get_max_batch_size()

    def query(self, **arguments: Any) -> Any:
        """Search; what is found will probably stand in a prompt soon."""
        with self._reading() as collection:
            found = collection.query(**arguments)
        self._retrieved([text for row in found.get("documents") or [] for text in row if text])
        return found

    def get(self, *arguments: Any, **named: Any) -> Any:
        """Records."""
        with self._reading() as collection:
            return collection.get(*arguments, **named)

    def records(self) -> Iterator[tuple[str, str]]:
        """Ids and texts of all records, read in pages."""
        offset = 0
        while True:
            page = self.get(limit=_PAGE, offset=offset, include=["documents"])
            yield from ((i, text) for i, text in zip(page["ids"], page["documents"], strict=True) if text)
            if len(page["ids"]) < _PAGE:
                return
            offset += _PAGE

    def add(self, ids: Any, **fields: Any) -> None:
        """Add records; as Chroma does, without a word about those that are there."""
        there = set(self.get(ids=_listed(ids), include=[])["ids"])
        kept = [n for n, i in enumerate(_listed(ids)) if i not in there]
        chosen = {name: [_listed(v)[n] for n in kept] for name, v in fields.items() if v is not None}
        if kept:
            self._write("add", [_listed(ids)[n] for n in kept], chosen)

    def upsert(self, ids: Any, **fields: Any) -> None:
        """Add or replace records."""
        self._write("upsert", _listed(ids), fields)

    def update(self, ids: Any, **fields: Any) -> None:
        """Change records that are there."""
        self._write("update", _listed(ids), fields)

    def delete(self, ids: Any = None, **conditions: Any) -> Any:
        """Remove records, and the caches that nobody else needs."""
        with self._writing() as (collection, companion, _):
            before: dict[str, str] = {}
            if ids is not None or any(conditions.values()):
                before = _texts(collection.get(ids=ids, include=["documents"], **conditions))
            done = collection.delete(ids=ids, **conditions)
            if companion is not None:
                companion.drop(before)
            self._known.remove(before.values())
            return done

    def _write(self, verb: str, ids: list[str], fields: dict[str, Any]) -> None:
        if len(set(ids)) < len(ids):
            raise DuplicateIDError(f"an id stands twice in one call of {verb}")
        with self._writing() as (collection, companion, limit):
            for start in range(0, len(ids), limit):
                part = slice(start, start + limit)
                chosen = {n: _listed(v)[part] for n, v in fields.items() if v is not None}
                self._write_batch(getattr(collection, verb), collection, companion, ids[part], chosen)

    def _write_batch(
        self,
        write: Callable[..., None],
        collection: Any,
        companion: Companion | None,
        ids: list[str],
        fields: dict[str, Any],
    ) -> None:
        texts = dict(zip(ids, fields.get("documents") or (), strict=False))
        before = _texts(collection.get(ids=ids, include=["documents"])) if texts else {}
        if write.__name__ == "update":  # of records that are not there, Chroma takes no notice
            texts = {i: text for i, text in texts.items() if i in before}
        freed = companion.hold(texts) if companion is not None else []
        try:
            write(ids=ids, **fields)
        except BaseException:
            if companion is not None:  # the references are to say what the collection has
                companion.drop(i for i in texts if i not in before)
                companion.collect(companion.hold({i: text for i, text in before.items() if i in texts}))
            raise
        if companion is not None:
            companion.collect(freed)
        self._known.remove(before.values())
        self._known.add(texts.values())


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, (str, dict)) else list(values)


def _texts(found: Any) -> dict[str, str]:
    return {i: text for i, text in zip(found["ids"], found["documents"] or (), strict=False) if text}

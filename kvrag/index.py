"""The Chroma collection of a corpus, behind the few calls that kvrag needs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import chromadb
import numpy as np
from chromadb.api.client import Client
from chromadb.api.types import validate_metadata
from chromadb.errors import ChromaError, NotFoundError

from kvrag.chroma_rows import Hit, Record, hits_in, records_in, rows_in
from kvrag.collection import Database, Embedding, open_collection, space_of
from kvrag.database import open_database
from kvrag.errors import ConfigError, CorpusError, DuplicateDocument, InputError

Metadata = Mapping[str, Any]
Vector = np.ndarray[Any, np.dtype[np.float32]]
_T = TypeVar("_T")
_PAGE = 1000
_CONTEXT = "kvrag_context"


class Index:
    """A collection, in a folder or on a server; made by `Index.open`.

    Many processes may read a folder; only one at a time may write, because Chroma corrupts a folder with
    several writers without an error. The first write takes a lock that `close` (or the process's end)
    gives back. A server does its own locking, and is the way to write from several processes. Within this
    process an index may be used from any thread.
    """

    def __init__(self, database: Database, name: str, embedding: Embedding | None) -> None:
        self._database = database
        self._name = name
        self._embedding = embedding
        self._writes = False
        self._lock = threading.RLock()
        self._lent: tuple[Client, chromadb.Collection] | None = None
        with self._reading() as collection:
            self._id = str(collection.id)
        with database.reading() as client:
            self._batch = client.get_max_batch_size()

    @staticmethod
    def open(
        path_or_url: str | Path,
        collection: str = "kvrag",
        *,
        embedding: Embedding | None = None,
    ) -> Index:
        """Open a collection; it is created if there is none.

        Args:
            path_or_url: folder of a Chroma database, or http(s)://host:port of a Chroma server.
            collection: its name, 3 to 512 characters of a-z A-Z 0-9 . _ -
            embedding: any Chroma embedding function. None: the one the collection was made with, and for
                a new collection `HashedEmbedding`, a default for trials.

        Raises:
            ConfigError: the collection was made with another embedding, or with one that is not known here.
            CorpusError: the database cannot be opened.
            CorpusLocked: the collection has to be created while another process is writing.
        """
        database = open_database(path_or_url)
        try:
            return Index(database, collection, embedding)
        except BaseException:
            database.close()
            raise

    @staticmethod
    def exists(path_or_url: str | Path, collection: str = "kvrag") -> bool:
        """Whether there is such a collection; nothing is created.

        Raises:
            CorpusError: the database cannot be opened.
        """
        if not str(path_or_url).startswith("http") and not Path(path_or_url).exists():
            return False
        database = open_database(path_or_url)
        try:
            with database.reading() as client:
                client.get_collection(collection, embedding_function=None)
        except NotFoundError:
            return False
        except (ChromaError, ValueError) as error:
            raise ConfigError(f"cannot open the collection {collection!r}: {error}") from error
        finally:
            database.close()
        return True

    @staticmethod
    def names(path_or_url: str | Path, *, having: str) -> list[str]:
        """Of a database's collections whose records have a field, sorted; one record of each is looked at.

        Nothing is created, and no collection's embedding has to be known.

        Raises:
            CorpusError: the database cannot be opened or read.
        """
        if not str(path_or_url).startswith("http") and not Path(path_or_url).exists():
            return []
        database = open_database(path_or_url)
        try:
            with database.reading() as client:
                names = [collection.name for collection in client.list_collections()]
                found = [client.get_collection(name, embedding_function=None) for name in names]
                return sorted(c.name for c in found if any(having in r.metadata for r in _one_of(c)))
        except ChromaError as error:
            raise CorpusError(f"cannot list the collections of {path_or_url}: {error}") from error
        finally:
            database.close()

    @property
    def id(self) -> str:
        """The collection's own id: another one once it is deleted and made again."""
        return self._id

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._name

    @staticmethod
    def check_records(ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Refuse what Chroma would refuse or quietly spoil, before anything is written.

        Raises:
            DuplicateDocument: an id twice.
            InputError: an id, text or metadata that cannot be kept.
        """
        seen: set[str] = set()
        for record_id, text, metadata in zip(ids, texts, metadatas, strict=True):
            if record_id in seen:
                raise DuplicateDocument(f"the id {record_id!r} stands twice in one call")
            seen.add(record_id)
            if not record_id:
                raise InputError("an id must not be empty")
            try:
                (record_id + text).encode()
                if metadata:
                    validate_metadata(cast(Any, dict(metadata)))
            except (ValueError, TypeError) as error:  # UnicodeEncodeError is a ValueError
                raise InputError(f"the document {record_id!r} cannot be kept: {error}") from error

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Which of these ids the collection holds."""
        with self._reading() as collection:
            batches = [
                collection.get(ids=batch, include=[])["ids"]
                for batch in self._batches(list(dict.fromkeys(ids)))
            ]
        return {record_id for batch in batches for record_id in batch}

    def add(self, ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Add new records.

        Raises:
            DuplicateDocument: an id that is there already; nothing was added.
            CorpusLocked: another process is writing.
        """
        self.begin_writing()
        taken = self.existing(ids)  # Chroma would ignore these silently
        if taken:
            raise DuplicateDocument(already_there(taken))
        with self._writing() as collection:
            for part in self._triples(ids, texts, metadatas):
                collection.add(**part)

    def upsert(self, ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Add records, or replace text and metadata of those that are there.

        Raises:
            CorpusLocked: another process is writing.
        """
        self.begin_writing()
        replaced = self._replacing(ids, metadatas)
        with self._writing() as collection:
            for part in self._triples(ids, texts, replaced):
                collection.upsert(**part)

    def _replacing(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> list[Metadata]:
        """Metadata that leaves nothing of what is there: Chroma merges, so old fields have to be None."""
        before = {record.id: record.metadata for record in self.get(ids)}
        return [
            {**dict.fromkeys(before.get(i, {})), **metadata}
            for i, metadata in zip(ids, metadatas, strict=True)
        ]

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Merge metadata into records that are there; a None removes its field.

        Raises:
            CorpusLocked: another process is writing.
        """
        with self._writing() as collection:
            for batch, some in zip(self._batches(ids), self._batches(metadatas), strict=True):
                collection.update(ids=batch, metadatas=cast(Any, [dict(m) for m in some]))

    def delete(self, ids: Sequence[str]) -> None:
        """Remove records; ids that are not there are passed over.

        Raises:
            CorpusLocked: another process is writing.
        """
        with self._writing() as collection:
            for batch in self._batches(ids):
                collection.delete(ids=batch)

    def forget(self) -> bool:
        """Overwrite what the database's file still holds of deleted and replaced texts; false if it cannot.

        Takes as long as copying the file; a server's file is the server's own.

        Raises:
            CorpusLocked: another process is writing.
        """
        self.begin_writing()
        return self._database.forget()

    def get(self, ids: Sequence[str]) -> list[Record]:
        """Those of the records that are there, in the order of `ids`."""
        found: dict[str, Record] = {}
        with self._reading() as collection:
            for batch in self._batches(list(dict.fromkeys(ids))):
                found.update((record.id, record) for record in records_in(collection.get(ids=batch)))
        return [found[i] for i in ids if i in found]

    def records(self) -> Iterator[Record]:
        """All records, read in pages; records added or removed meanwhile may be missed or come twice."""
        offset = 0
        while page := self._page(offset):
            yield from page
            offset += len(page)

    def _page(self, offset: int) -> list[Record]:
        with self._reading() as collection:
            return records_in(collection.get(limit=_PAGE, offset=offset))

    def records_with_vectors(
        self, where: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Record, Vector | None]]:
        """The same with the vectors that Chroma has of them; those that a filter on metadata lets through."""
        offset = 0
        while True:
            with self._reading() as collection:
                everything = ["documents", "metadatas", "embeddings"]
                found = collection.get(
                    where=cast(Any, where), limit=_PAGE, offset=offset, include=cast(Any, everything)
                )
            page, vectors = records_in(found), found["embeddings"]
            if not page:
                return
            yield from zip(page, [None] * len(page) if vectors is None else vectors, strict=True)
            offset += len(page)

    def add_with_vectors(self, records: Sequence[Record], vectors: Sequence[Vector | None]) -> None:
        """Add records, or replace those that are there, under these vectors; those with none are embedded.

        Vectors have to be of the collection's length.

        Raises:
            CorpusLocked: another process is writing.
        """
        pairs = list(zip(records, vectors, strict=True))
        bare = [record for record, vector in pairs if vector is None]
        self.upsert([r.id for r in bare], [r.text for r in bare], [r.metadata for r in bare])
        with self._writing() as collection:
            for batch in self._batches([(r, v) for r, v in pairs if v is not None]):
                ids = [record.id for record, _ in batch]
                told = self._replacing(ids, [record.metadata for record, _ in batch])
                collection.upsert(
                    ids=ids,
                    documents=[record.text for record, _ in batch],
                    metadatas=cast(Any, [dict(m) or None for m in told]),
                    embeddings=cast(Any, [vector for _, vector in batch]),
                )

    @property
    def embedding(self) -> dict[str, Any]:
        """Name and settings of the collection's embedding, as Chroma notes them."""
        with self._reading() as collection:
            noted = collection.configuration_json.get("embedding_function") or {}
        return {"name": noted.get("name"), "config": noted.get("config") or {}}

    def matching(self, where: Mapping[str, Any]) -> list[Record]:
        """All records that a Chroma filter on metadata lets through."""
        with self._reading() as collection:
            return records_in(collection.get(where=cast(Any, where)))

    def nearest(self, ids: Sequence[str], k: int) -> dict[str, list[Record]]:
        """The `k` records nearest to each of these, nearest first, by the vectors that Chroma has of them.

        A record may be among its own; ids that are not there are left out.
        """
        found: dict[str, list[Record]] = {}
        with self._reading() as collection:
            for batch in self._batches(list(dict.fromkeys(ids))):
                there = collection.get(ids=batch, include=["embeddings"])
                if there["ids"] and there["embeddings"] is not None:
                    near = collection.query(
                        query_embeddings=there["embeddings"], n_results=k, include=["documents", "metadatas"]
                    )
                    found.update(zip(there["ids"], rows_in(near), strict=True))
        return found

    @property
    def context(self) -> str | None:
        """What the collection's chunks are encoded behind, as `kvrag.config.Context` puts it, if noted."""
        with self._database.reading() as client:
            # Not the collection at hand: another object may have noted it since.
            noted = client.get_collection(self._name, embedding_function=None).metadata or {}
        context = noted.get(_CONTEXT)
        return None if context is None else str(context)

    def note_context(self, context: str) -> None:
        """Note in the collection's own metadata what its chunks are encoded behind.

        Raises:
            CorpusLocked: another process is writing.
        """
        with self._writing():
            with self._database.reading() as client:
                collection = client.get_collection(self._name, embedding_function=None)
            # Chroma refuses to be told its distance again, and keeps it elsewhere, too.
            kept = {k: v for k, v in (collection.metadata or {}).items() if not k.startswith("hnsw:")}
            collection.modify(metadata={**kept, _CONTEXT: context})

    def search(self, query: str, k: int, *, where: Mapping[str, Any] | None = None) -> list[Hit]:
        """The `k` nearest records, nearest first; fewer if there are fewer.

        Args:
            query: any text.
            k: how many, at least 1.
            where: a Chroma filter on metadata.

        Raises:
            InputError: k is below 1.
        """
        if k < 1:
            raise InputError(f"k={k}: expected at least 1")
        with self._reading() as collection:
            found = collection.query(query_texts=[query], n_results=k, where=cast(Any, where))
        return hits_in(found, space_of(collection))

    def embed(self, texts: Sequence[str]) -> list[Vector]:
        """The vectors that texts get in this collection, for `add_with_vectors`."""
        with self._reading() as collection:
            return [
                np.asarray(vector, dtype=np.float32)
                for batch in self._batches(texts)
                for vector in collection._embed(batch)
            ]

    def first(self) -> Record | None:
        """One of the records; None if there is none."""
        with self._reading() as collection:
            return next(iter(_one_of(collection)), None)

    def count(self) -> int:
        """How many records there are."""
        with self._reading() as collection:
            return collection.count()

    def begin_writing(self) -> None:
        """Take the writers' lock now, and hold it until `end_writing` or `close`; every change does so.

        Raises:
            CorpusLocked: another process is writing.
        """
        with self._lock:
            if not self._writes:
                self._database.begin_writing()
                self._writes = True

    def end_writing(self) -> None:
        """Give the writers' lock back, so that other processes can write."""
        with self._lock:
            if self._writes:
                self._database.end_writing()
            self._writes = False

    def close(self) -> None:
        """Give back the writers' lock and the database; the object cannot be used afterwards."""
        with self._lock:
            self.end_writing()
            self._database.close()

    @contextmanager
    def _reading(self) -> Iterator[chromadb.Collection]:
        with self._database.reading() as client:
            yield self._collection(client)

    @contextmanager
    def _writing(self) -> Iterator[chromadb.Collection]:
        self.begin_writing()
        with self._database.writing() as client:
            yield self._collection(client)

    def _collection(self, client: Client) -> chromadb.Collection:
        """The collection by this client, which is another one after the folder was opened anew."""
        if self._lent is None or self._lent[0] is not client:
            self._lent = client, open_collection(self._database, client, self._name, self._embedding)
        return self._lent[1]

    def _batches(self, items: Sequence[_T]) -> Iterator[list[_T]]:
        for start in range(0, len(items), self._batch):
            yield list(items[start : start + self._batch])

    def _triples(
        self, ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Metadata]
    ) -> Iterator[dict[str, Any]]:
        batches = (self._batches(ids), self._batches(texts), self._batches(metadatas))
        for some_ids, some_texts, some_metadatas in zip(*batches, strict=True):
            # Chroma refuses an empty dictionary, and takes None in its place.
            rows = [dict(metadata) or None for metadata in some_metadatas]
            yield {"ids": some_ids, "documents": some_texts, "metadatas": rows}


def _one_of(collection: chromadb.Collection) -> list[Record]:
    """One of its records; none if it is empty."""
    return records_in(collection.get(limit=1))


def already_there(ids: Iterable[str]) -> str:
    """The message about ids that exist, with the first few of them."""
    ids = sorted(ids)
    names = ", ".join(map(repr, ids[:3])) + (" ..." if len(ids) > 3 else "")
    return f"the corpus already holds {len(ids)} of these ids: {names}; use upsert to replace"

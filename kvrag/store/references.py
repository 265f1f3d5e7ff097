"""Who refers to which entry: collections can share a store, and the last one out removes the bytes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kvrag.errors import StoreWriteError
from kvrag.store.files import make_folder, write_error

_SCHEMA = """
CREATE TABLE IF NOT EXISTS refs (
    owner TEXT NOT NULL, record_id TEXT NOT NULL, key_id TEXT NOT NULL,
    PRIMARY KEY (owner, record_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS refs_by_key ON refs (key_id);
"""
_BUSY_SECONDS = 30.0


class References:
    """Counted references (owner, record id) -> key id, shared by processes through one SQLite file.

    Record ids belong to the user and are kept as they are; texts are not. Every change is one
    transaction that has taken the file's write lock before it reads, so counts are never stale.

    Args:
        path: the file; created by the first change. None keeps the references in memory.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()

    @classmethod
    def beside(cls, store: object) -> References:
        """Those that lie in a store's folder; of a store without a `path`, references in memory."""
        path = getattr(store, "path", None)
        return cls(None if path is None else Path(path) / "references.sqlite")

    def add(self, owner: str, keys: Mapping[str, str]) -> list[str]:
        """Note that `owner`'s records refer to these keys, instead of those they referred to before.

        Args:
            owner: id of a collection.
            keys: record id -> key id.

        Returns:
            Ids that a record has let go of and that nobody refers to any more.

        Raises:
            StoreWriteError: the file cannot be written; nothing has changed.
        """
        with self._writing() as db:
            before = self._keys(db, owner, keys)
            rows = [(owner, record, key) for record, key in keys.items()]
            db.executemany("INSERT OR REPLACE INTO refs VALUES (?, ?, ?)", rows)
            return self._free(db, before)

    def remove(self, owner: str, record_ids: Iterable[str]) -> list[str]:
        """Forget these records; ids that nobody refers to any more.

        Raises:
            StoreWriteError: the file cannot be written; nothing has changed.
        """
        record_ids = list(record_ids)
        with self._writing() as db:
            before = self._keys(db, owner, record_ids)
            db.executemany(
                "DELETE FROM refs WHERE owner = ? AND record_id = ?", [(owner, r) for r in record_ids]
            )
            return self._free(db, before)

    def collect(self, key_ids: Iterable[str], delete: Callable[[str], object]) -> list[str]:
        """Delete the entries among `key_ids` that nobody refers to, while nobody can begin to.

        Args:
            key_ids: candidates.
            delete: removes one entry; false if there was none. `KVStore.delete` is one.

        Returns:
            Ids for which `delete` gave something true.

        Raises:
            StoreWriteError: the file, or an entry, cannot be written.
        """
        with self._writing() as db:
            return [key for key in self._free(db, key_ids) if delete(key)]

    def of(self, owner: str) -> dict[str, str]:
        """Record id -> key id of one owner."""
        with self._reading() as db:
            return (
                dict(db.execute("SELECT record_id, key_id FROM refs WHERE owner = ?", (owner,))) if db else {}
            )

    def named(self, owner: str, record_ids: Iterable[str]) -> dict[str, str]:
        """The same for some records of one owner."""
        query = "SELECT key_id FROM refs WHERE owner = ? AND record_id = ?"
        with self._reading() as db:
            rows = [(r, db.execute(query, (owner, r)).fetchone()) for r in record_ids] if db else []
        return {record: row[0] for record, row in rows if row is not None}

    def count(self, key_id: str) -> int:
        """How many records of all owners refer to the key."""
        with self._reading() as db:
            return 0 if db is None else self._count(db, key_id)

    def close(self) -> None:
        """Close the file; the object can be used again."""
        with self._lock:
            if self._connection is not None and self._path is not None:
                self._connection.close()
                self._connection = None

    @staticmethod
    def _count(db: sqlite3.Connection, key_id: str) -> int:
        (count,) = db.execute("SELECT count(*) FROM refs WHERE key_id = ?", (key_id,)).fetchone()
        return int(count)

    @staticmethod
    def _keys(db: sqlite3.Connection, owner: str, record_ids: Iterable[str]) -> list[str]:
        query = "SELECT key_id FROM refs WHERE owner = ? AND record_id = ?"
        rows = [db.execute(query, (owner, record)).fetchone() for record in record_ids]
        return [row[0] for row in rows if row is not None]

    def _free(self, db: sqlite3.Connection, key_ids: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(key_ids) if self._count(db, key) == 0]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The open file, or None if there is none yet and reading must not create it."""
        with self._lock:
            if self._connection is None and self._path is not None and not self._path.exists():
                yield None
            else:
                yield self._connection or self._open()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                db = self._connection or self._open()
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise StoreWriteError(
                    f"cannot write {self._path}: {error}; check that the disk is not full or read-only"
                ) from error

    def _open(self) -> sqlite3.Connection:
        name = ":memory:"
        if self._path is not None:
            name = str(self._path)
            try:
                make_folder(self._path.parent)
            except OSError as error:
                raise write_error(error, self._path) from error
        db = sqlite3.connect(name, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
        self._connection = db
        return db

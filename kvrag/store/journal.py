"""What tiers still owe each other: entries to be uploaded, and erasures that may not be undone."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from kvrag.errors import StoreWriteError
from kvrag.store.files import make_folder, write_error

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pending (
    key_id TEXT NOT NULL, tier TEXT NOT NULL, PRIMARY KEY (key_id, tier)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS erased (
    key_id TEXT NOT NULL, tier TEXT NOT NULL, noted REAL NOT NULL, done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (key_id, tier)
) WITHOUT ROWID;
"""
_BUSY_SECONDS = 30.0


@runtime_checkable
class Holds(Protocol):
    """A store that evicts, and can be told to wait with that; see `DiskStore`."""

    def hold(self, key_ids: Iterable[str]) -> None:
        """Evict none of these before `release`; also after a restart."""
        ...

    def release(self, key_ids: Iterable[str]) -> None:
        """Let these be evicted again."""
        ...

    def held(self) -> list[str]:
        """Ids of all that are held."""
        ...


class Journal:
    """Two small tables in one SQLite file, shared by processes; ids and names of tiers only.

    *Pending* are entries that a tier is to get and has not. *Erased* are entries that were deleted: until
    every tier has confirmed it, and for a while after, so that a copy under way in another process is not
    taken for an entry.

    What is pending is held in the store that it is to come from: an entry that would be evicted before a tier
    has it would be lost to that tier. Holds change within the transactions that change what is pending, so
    that processes agree about both.

    Args:
        path: the file; created by the first change. None keeps all of it in memory.
        source: where pending entries come from, if it evicts.
    """

    def __init__(self, path: str | Path | None, source: Holds | None = None) -> None:
        self._source = source
        self._path = None if path is None else Path(path)
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()

    def owe(self, key_id: str, tiers: Iterable[str]) -> None:
        """Note that these tiers are to get the entry, and hold it until they have it.

        Raises:
            StoreWriteError: the file cannot be written; so for all that change it.
        """
        with self._writing() as db:
            db.executemany("INSERT OR IGNORE INTO pending VALUES (?, ?)", [(key_id, t) for t in tiers])
            if self._source is not None:
                self._source.hold([key_id])

    def settle(self, key_id: str, tier: str, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """The tier has it, or cannot get it any more.

        Args:
            key_id: of the entry.
            tier: name of the tier.
            unless: asked while nobody else can change the journal; true: nothing is settled.

        Returns:
            Whether it is settled.
        """
        with self._writing() as db:
            if unless():
                return False
            db.execute("DELETE FROM pending WHERE key_id = ? AND tier = ?", (key_id, tier))
            left = db.execute("SELECT 1 FROM pending WHERE key_id = ?", (key_id,)).fetchone()
            if left is None and self._source is not None:
                self._source.release([key_id])
        return True

    def hold_pending(self) -> None:
        """Hold all that is pending: a crash may have come between, and others may have let go of it."""
        ids = dict.fromkeys(key_id for key_id, _ in self.pending())
        if ids and self._source is not None:
            self._source.hold(ids)

    def release_settled(self) -> None:
        """Let go of what is held and not pending."""
        if self._source is not None and self._source.held():
            with self._writing() as db:
                pending = {row[0] for row in db.execute("SELECT key_id FROM pending")}
                self._source.release([key_id for key_id in self._source.held() if key_id not in pending])

    def pending(self) -> list[tuple[str, str]]:
        """(id, tier) of all that is to be uploaded."""
        with self._reading() as db:
            return list(db.execute("SELECT key_id, tier FROM pending")) if db else []

    def is_pending(self, key_id: str, tier: str) -> bool:
        """Whether the tier is still to get the entry."""
        query = "SELECT 1 FROM pending WHERE key_id = ? AND tier = ?"
        with self._reading() as db:
            return db is not None and db.execute(query, (key_id, tier)).fetchone() is not None

    def erase(self, key_id: str, tiers: Iterable[str]) -> None:
        """Note that these tiers have to let go of the entry, and cancel its uploads."""
        rows = [(key_id, tier, time.time()) for tier in tiers]
        with self._writing() as db:
            db.execute("DELETE FROM pending WHERE key_id = ?", (key_id,))
            db.executemany("INSERT OR REPLACE INTO erased VALUES (?, ?, ?, 0)", rows)

    def confirm(self, key_id: str, tiers: Iterable[str]) -> None:
        """These tiers hold no bytes of it any more."""
        query = "UPDATE erased SET done = 1 WHERE key_id = ? AND tier = ?"
        with self._writing() as db:
            db.executemany(query, [(key_id, tier) for tier in tiers])

    def revive(self, key_id: str) -> None:
        """The entry was put again."""
        if self.is_erased(key_id):
            with self._writing() as db:
                db.execute("DELETE FROM erased WHERE key_id = ?", (key_id,))

    def is_erased(self, key_id: str) -> bool:
        """Whether the entry was deleted, and not put again."""
        query = "SELECT 1 FROM erased WHERE key_id = ?"
        with self._reading() as db:
            return db is not None and db.execute(query, (key_id,)).fetchone() is not None

    def erased(self) -> set[str]:
        """Ids of all such entries."""
        with self._reading() as db:
            return {row[0] for row in db.execute("SELECT key_id FROM erased")} if db else set()

    def unconfirmed(self) -> list[tuple[str, str]]:
        """(id, tier) of erasures that a tier has not confirmed."""
        with self._reading() as db:
            return list(db.execute("SELECT key_id, tier FROM erased WHERE NOT done")) if db else []

    def forget(self, grace_seconds: float) -> None:
        """Drop erasures that all tiers have confirmed, and that are older than this (or from the future)."""
        if not self.erased():
            return
        with self._writing() as db:
            db.execute(
                "DELETE FROM erased WHERE abs(? - noted) >= ? AND key_id NOT IN "
                "(SELECT key_id FROM erased WHERE NOT done)",
                (time.time(), grace_seconds),
            )

    def close(self) -> None:
        """Close the file; the object can be used again."""
        with self._lock:
            if self._connection is not None and self._path is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The database, or None if nothing was ever written."""
        with self._lock:
            is_new = self._connection is None and self._path is not None and not self._path.exists()
            yield None if is_new else self._open()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that has the file's write lock from its beginning.

        Raises:
            StoreWriteError: the file cannot be written; nothing has changed.
        """
        with self._lock:
            try:
                if self._path is not None:
                    make_folder(self._path.parent)
                db = self._open()
                db.execute("BEGIN IMMEDIATE")
                with db:
                    yield db
            except sqlite3.Error as error:
                raise StoreWriteError(f"cannot write {self._path}: {error}") from error
            except OSError as error:
                if isinstance(error, StoreWriteError) or self._path is None:
                    raise
                raise write_error(error, self._path) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            db = sqlite3.connect(
                ":memory:" if self._path is None else self._path,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(_SCHEMA)
            except BaseException:
                db.close()
                raise
            self._connection = db
        return self._connection

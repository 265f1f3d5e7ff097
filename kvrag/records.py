"""Texts with fields under names, in one SQLite file that processes share: no vectors, no search.

Frameworks call it a document store. What is deleted is overwritten in the file; everything is JSON.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kvrag.errors import CorpusError, CorpusLocked, InputError, StoreWriteError
from kvrag.store.files import exclusive, make_folder, write_error
from kvrag.store.index_file import connect, is_damage

_VERSION = 1
_PAGE = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (id TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept under a name.

    Attributes:
        text: the document's.
        fields: what else there is to it; anything that JSON gives back as it was.
    """

    text: str
    fields: Mapping[str, Any]


def written(name: str, record: Record) -> str:
    """A record as it lies in the file: JSON in ASCII, so that every text can be written.

    Raises:
        InputError: JSON does not give a field back as it is.
    """
    for field, value in record.fields.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            same = False
        if same is not True:
            raise InputError(
                f"{name!r}: {field} is not kept as it is by JSON; use text, numbers, true, false, None, and "
                "lists and dictionaries (with text as keys) of these"
            )
    return json.dumps({"text": record.text, "fields": dict(record.fields)})


class RecordFile:
    """Records by name; may be used from any thread and any number of processes.

    Readers see what was written last. Changes are made inside `writing`, one process at a time.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the file in a folder, and make both if need be.

        Raises:
            StoreWriteError: the folder cannot be written to.
            CorpusError: the file is damaged, or of a later version.
        """
        self.path = Path(folder) / "records.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()
        self.id = self._about()

    def get(self, names: Iterable[str]) -> dict[str, Record]:
        """Those records that are there."""
        query = "SELECT value FROM records WHERE id = ?"
        with self._open() as db:
            rows = {name: db.execute(query, (name,)).fetchone() for name in names}
        return {name: self._read(row[0]) for name, row in rows.items() if row is not None}

    def names(self, prefix: str = "") -> Iterator[list[str]]:
        """Names that begin so, in order and in pages; names that come and go meanwhile may be missed."""
        for page in self._pages("id", prefix):
            yield [name for (name,) in page]

    def records(self) -> Iterator[tuple[str, Record]]:
        """All names and records, read in pages."""
        for page in self._pages("id, value", ""):
            yield from ((name, self._read(value)) for name, value in page)

    def count(self) -> int:
        """How many records there are."""
        with self._open() as db:
            return int(db.execute("SELECT count(*) FROM records").fetchone()[0])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Several calls as one change: all of it, or nothing if an error passes.

        Raises:
            CorpusLocked: another process has been writing for half a minute.
            StoreWriteError: the disk is full, or read-only.
        """
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            with suppress(sqlite3.Error):  # what is gone, from the log, too; else with the next change
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def put(self, rows: Mapping[str, str]) -> None:
        """Add or replace records, as `written` gives them; inside `writing`."""
        with self._open() as db:
            db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", list(rows.items()))

    def remove(self, names: Iterable[str]) -> None:
        """Remove those that are there; inside `writing`."""
        with self._open() as db:
            db.executemany("DELETE FROM records WHERE id = ?", [(name,) for name in names])

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _pages(self, columns: str, prefix: str) -> Iterator[list[Any]]:
        """SQLite compares names byte by byte: those with one prefix lie together, and it comes first."""
        after, than = prefix, ">="
        while True:
            query = f"SELECT {columns} FROM records WHERE id {than} ? ORDER BY id LIMIT {_PAGE}"  # noqa: S608
            with self._open() as db:
                found = db.execute(query, (after,)).fetchall()
            page = [row for row in found if row[0].startswith(prefix)]
            if page:
                yield page
            if len(page) < _PAGE:
                return
            after, than = page[-1][0], ">"

    def _read(self, value: str) -> Record:
        try:
            raw = json.loads(value)
            return Record(raw["text"], raw["fields"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connection or self._connect()
            except sqlite3.Error as error:
                raise self._said(error) from error

    def _connect(self) -> sqlite3.Connection:
        try:
            make_folder(self.path.parent)
            with exclusive(self.path.with_suffix(".lock")):  # the journal's mode is chosen by one process
                db = connect(self.path)
        except OSError as error:
            raise write_error(error, self.path) from error
        try:
            db.execute("PRAGMA synchronous = FULL")  # unlike an index, this cannot be built again
            self._found(db)
        except BaseException:
            db.close()
            raise
        self._connection = db
        return db

    @staticmethod
    def _found(db: sqlite3.Connection) -> None:
        """Make the tables unless they are there: the first one to come gives the file its id."""
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone():
            return
        about = [("id", uuid4().hex), ("version", str(_VERSION))]
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in _SCHEMA.strip().split("\n"):
                db.execute(statement)
            db.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", about)
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def _about(self) -> str:
        with self._open() as db:
            about = dict(db.execute("SELECT name, value FROM about"))
        if about.get("version") != str(_VERSION) or "id" not in about:
            self.close()
            raise CorpusError(
                f"{self.path} was written by another version of kvrag: use that, or a new folder"
            )
        return str(about["id"])

    def _said(self, error: sqlite3.Error) -> Exception:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return CorpusLocked(f"another process is writing to {self.path}: try again when it has finished")
        if is_damage(error):
            return self._damaged(error)
        return StoreWriteError(
            f"cannot write {self.path}: {error}; check that the disk is not full or read-only"
        )

    def _damaged(self, error: Exception) -> CorpusError:
        return CorpusError(
            f"{self.path} is damaged, or not a file of kvrag's ({error}): restore it, or use a new folder"
        )

"""A Chroma database as this process has it open: one client, kept fresh, and one writer at a time."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import chromadb
from chromadb.api.client import Client

from kvrag.errors import CorpusError, CorpusLocked
from kvrag.graph_files import GraphFiles
from kvrag.store.files import try_lock

logger = logging.getLogger(__name__)

# Of log rows whose text the collection has taken up already, and that a later row deletes or replaces.
_FORGET = """
UPDATE embeddings_queue SET metadata = '{}'
WHERE operation != 3 AND seq_id <= (SELECT min(seq_id) FROM max_seq_id) AND EXISTS (
    SELECT 1 FROM embeddings_queue AS later
    WHERE later.id = embeddings_queue.id AND later.topic = embeddings_queue.topic
    AND later.seq_id > embeddings_queue.seq_id
)
"""


class ServerDatabase:
    """A Chroma server, which does its own locking."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 8000)
        try:
            client = chromadb.HttpClient(parts.hostname or "", port, ssl=secure)
        except Exception as error:  # of many kinds
            raise CorpusError(f"cannot reach a Chroma server at {url}: {error}") from error
        self._client = cast(Client, client)

    @contextmanager
    def reading(self) -> Iterator[Client]:
        """The client."""
        yield self._client

    @contextmanager
    def writing(self) -> Iterator[Client]:
        """The client."""
        yield self._client

    def forget(self) -> bool:
        """False: only the server can."""
        return False

    def begin_writing(self) -> None:
        """Nothing to do: the server orders writes."""

    def end_writing(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Close both of the client's connections, which its own `close` leaves to the garbage collector."""
        servers = [self._client._server, getattr(self._client._admin_client, "_server", None)]
        self._client.close()
        for server in servers:
            session = getattr(server, "_session", None)
            if session is not None:
                session.close()


class FolderDatabase:
    """A folder with Chroma's files; `open_database` gives the one object that this process has for it.

    Chroma keeps parts of its index in memory, does not notice what other processes write, and saves what
    it has in memory over theirs: vectors are lost without an error, even when the processes write one
    after the other. Therefore only one process writes at a time, every write moves a counter in the lock
    file, and a process that finds the counter moved opens the folder anew before it reads or writes.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock_file = Path(folder) / "kvrag-writer.lock"
        self._lock = threading.RLock()  # no call may be under way while the folder is opened anew
        self._client: Client | None = None
        self._generation = -1
        self._stale = False
        self._descriptor = -1
        self._writers = 0
        self._graphs = GraphFiles(folder)
        self.users = 0

    @contextmanager
    def reading(self) -> Iterator[Client]:
        """The client, seeing all that was written so far.

        Raises:
            CorpusError: the database cannot be opened.
        """
        with self._lock:
            yield self._fresh_client(to_write=False)

    @contextmanager
    def writing(self) -> Iterator[Client]:
        """The client, for one change; between `begin_writing` and `end_writing` only.

        Raises:
            CorpusError: the database cannot be opened, or opened anew.
        """
        with self._lock:
            client = self._fresh_client(to_write=True)
            self._move_counter()  # before, in case we do not live to do it afterwards
            try:
                yield client
            finally:
                self._graphs.blank()
                self._move_counter()

    def begin_writing(self) -> None:
        """Take the lock, or a share of it if this process has it already.

        Raises:
            CorpusLocked: another process has it, or the folder cannot be written to.
        """
        with self._lock:
            if self._writers == 0:
                self._descriptor = self._take_lock()
            self._writers += 1

    def end_writing(self) -> None:
        """Give the share back, and the lock with the last one."""
        with self._lock:
            self._writers -= 1
            if self._writers == 0:
                os.close(self._descriptor)

    def forget(self) -> bool:
        """Overwrite texts that were deleted or replaced and that the file still holds; false if it cannot.

        Chroma keeps them in its log of changes, which it cuts off every thousand changes or so, and SQLite in
        pages that nobody uses. What the log says of vectors stays: the graph may not have read it yet. Only
        between `begin_writing` and `end_writing`.
        """
        with self.writing(), closing(sqlite3.connect(f"{self._folder}/chroma.sqlite3", timeout=30.0)) as db:
            try:
                db.isolation_level = None
                db.execute("PRAGMA secure_delete = ON")
                db.execute(_FORGET)
                db.execute("VACUUM")
            except sqlite3.Error as error:
                logger.warning("deleted texts may still lie in %s: %s", self._folder, error)
                return False
            return True

    def close(self) -> None:
        """Let go of the folder; the client is closed with its last user."""
        with _folders_lock, self._lock:
            self.users -= 1
            if self.users == 0:
                _folders.pop(self._folder, None)
                if self._client is not None:
                    self._client.close()
                    self._client = None

    def _fresh_client(self, *, to_write: bool) -> Client:
        generation = self._read_counter()[0]  # before opening: what comes after it is noticed next time
        if self._client is None:
            self._client = self._open()
        elif generation != self._generation or (to_write and self._stale):
            server = self._client._server
            self._client.close()
            self._client = self._open()
            # Chroma shares one server object among a folder's clients, and only the last one closes it.
            self._stale = self._client._server is server
        self._generation = generation
        if to_write and self._stale:
            raise CorpusError(
                f"another process has written to {self._folder} since this one opened it, and this process "
                "has other Chroma clients of the folder: close them before writing, or vectors are lost"
            )
        return self._client

    def _open(self) -> Client:
        try:
            return cast(Client, chromadb.PersistentClient(self._folder))
        except Exception as error:  # of many kinds, down to panics of its Rust part
            raise CorpusError(f"cannot open the Chroma database in {self._folder}: {error}") from error

    def _take_lock(self) -> int:
        try:
            descriptor = try_lock(self._lock_file)
        except OSError as error:
            raise CorpusLocked(f"cannot write to {self._folder}: {error.strerror}") from error
        if descriptor is None:
            raise CorpusLocked(
                f"another process (pid {self._read_counter()[1]}) writes to {self._folder}: wait until it "
                "has closed its corpus, or run `chroma run` there and give its http:// address to both"
            )
        return descriptor

    def _read_counter(self) -> tuple[int, int]:
        """How many changes there were, and which process made the last one."""
        try:
            number, pid = self._lock_file.read_bytes().split()
            return int(number), int(pid)
        except (OSError, ValueError):
            return 0, 0

    def _move_counter(self) -> None:
        self._generation = self._read_counter()[0] + 1
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, f"{self._generation:020d} {os.getpid():010d}\n".encode())  # always as long


# Locks belong to the process, and so do these; Chroma, too, keeps one server object per folder and process.
_folders: dict[str, FolderDatabase] = {}
_folders_lock = threading.Lock()


def open_database(path_or_url: str | Path) -> FolderDatabase | ServerDatabase:
    """The database in a folder, which is created, or at an http(s):// address; to be closed after use.

    Raises:
        CorpusError: it cannot be reached or created.
    """
    if str(path_or_url).startswith(("http://", "https://")):
        return ServerDatabase(str(path_or_url))
    try:
        Path(path_or_url).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"cannot create the folder {path_or_url}: {error.strerror}") from error
    name = os.path.realpath(path_or_url)
    with _folders_lock:
        database = _folders.setdefault(name, FolderDatabase(name))
        database.users += 1
        return database

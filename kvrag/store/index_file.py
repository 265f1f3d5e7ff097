"""Opening the index's file: on local disks many processes at once, elsewhere as well as it goes."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

BUSY_SECONDS = 30.0
_NETWORKS = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p afs ceph glusterfs lustre gpfs beegfs fuse.sshfs fuse.glusterfs".split()
)
_MOUNTS = Path("/proc/self/mounts")


class Unbuilt(Exception):
    """The file is not, or not yet, an index: it has to be built from the entries' files."""


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the index's file, and create it unless it is only to be read.

    Write-ahead logging lets readers go on while somebody writes. It needs memory that all users share, so
    not on network folders: there a rollback journal serves, which is slower and as safe as their locks.

    Raises:
        sqlite3.Error: it cannot be opened, or is no database.
    """
    if read_only:
        return _connect_to_read(path)
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        mode = _use_journal(db, path.parent)
        if mode != "wal":
            logger.info("the index %s keeps a rollback journal (%s): slower, but right", path, mode)
        # A crash of the machine may take the last changes back; they are found again by what the files say.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, not only let go of
    except BaseException:
        db.close()
        raise
    return db


def _use_journal(db: sqlite3.Connection, folder: Path) -> str:
    if not is_on_network(folder):
        with suppress(sqlite3.OperationalError):  # no memory can be shared here
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)
    (mode,) = db.execute("PRAGMA journal_mode = TRUNCATE").fetchone()
    return str(mode)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """As others write it where that works; as it lies there on media that nobody can write to."""
    uri = path.absolute().as_uri()
    options = ["mode=ro"]
    if not path.with_name(path.name + "-wal").exists():
        options.append("mode=ro&immutable=1")
    for option in options:
        db = sqlite3.connect(
            f"{uri}?{option}", uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error:
            db.close()
            if option == options[-1]:
                raise
        else:
            return db
    raise AssertionError("one of the two has raised")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is not what was written; others may pass."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return False
    if code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return True
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT):
        return True
    # A table or column that has to be there, or a value of a type that none of ours has.
    return code == sqlite3.SQLITE_ERROR and ("no such" in str(error) or "user-defined" in str(error))


def remove_index(path: Path) -> None:
    """Remove the index's files; the caller holds the store's lock, which everybody takes to open them.

    Whoever has them open notices: SQLite does not touch the new files through the old ones.
    """
    for suffix in ("-wal", "-shm", "-journal", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()


def is_on_network(folder: Path) -> bool:
    """Whether a folder is on a network file system, as far as the operating system tells (Linux)."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
        here = folder.resolve()
    except OSError:
        return False
    best, kind = -1, ""
    for line in lines:
        _, place, name, *_ = line.split(" ")
        mount = Path(place.replace("\\040", " "))
        if len(mount.parts) >= best and here.is_relative_to(mount):
            best, kind = len(mount.parts), name
    return kind in _NETWORKS

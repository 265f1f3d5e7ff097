"""Files that are there whole or not at all, and locks between processes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from kvrag.errors import StoreWriteError
from kvrag.store.together import together
from kvrag.store.writeback import gather, write_back

PARTIAL = ".partial"

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_PIECE_BYTES = 4 << 20
_MAX_PARTS = 1000  # Linux takes 1024 at a time
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def write_partial(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write and sync a new file that is not yet anybody's; removed again if that fails.

    Raises:
        OSError: disk full, read-only, no permission; nothing is left behind.
    """
    write_partials([(path, parts)])


def write_partials(files: Iterable[tuple[Path, Iterable[bytes | memoryview]]]) -> None:
    """Write new files that are not yet anybody's, then sync them side by side; removed again if that fails.

    The disk begins with each piece while the next one is copied, and the waiting is done once: a sync of many
    files takes hardly longer than that of one.

    Args:
        files: paths and contents, taken one after the other: a content can be made when it is its turn.

    Raises:
        OSError: disk full, read-only, no permission; nothing is left behind.
    """
    descriptors: list[int] = []
    made: list[Path] = []
    try:
        for path, parts in files:
            descriptors.append(os.open(path, _NEW, 0o666))
            made.append(path)
            _write(descriptors[-1], parts)
        together([partial(os.fsync, descriptor) for descriptor in descriptors])
    except BaseException:  # also Ctrl-C: half a file helps nobody
        for path in made:
            remove(path)
        raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _write(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    """Append all parts, in pieces that the disk begins to write at once."""
    at = 0
    for piece in _pieces(parts):
        size = sum(map(len, piece))
        written = gather(descriptor, piece)
        if written < size:  # interrupted, or more than the system takes at a time
            rest = memoryview(b"".join(piece))
            while written < size:
                written += os.write(descriptor, rest[written:])
        write_back(descriptor, at, size)
        at += size


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    """The parts in groups of some megabytes: the page cache then has large pages, which are read faster."""
    piece: list[bytes | memoryview] = []
    size = 0
    for part in parts:
        for start in range(0, len(part), _PIECE_BYTES):
            chunk = part[start : start + _PIECE_BYTES]
            if piece and (size + len(chunk) > _PIECE_BYTES or len(piece) >= _MAX_PARTS):
                yield piece
                piece, size = [], 0
            piece.append(chunk)
            size += len(chunk)
    if piece:
        yield piece


def commit(partial: Path, final: Path) -> None:
    """Give a written file its name, so that after a crash it has this name or still the other."""
    commit_all([(partial, final)])


def commit_all(renames: Sequence[tuple[Path, Path]]) -> None:
    """Give written files their names; when it returns, a crash does not take them back.

    A crash before that leaves some of them with their new names, in no order.
    """
    for old, new in renames:
        os.replace(old, new)
    together([partial(sync_folder, folder) for folder in dict.fromkeys(new.parent for _, new in renames)])


def sync_folder(folder: Path) -> None:
    """Make the folder's own list of names last; a no-op where folders cannot be opened (Windows)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a crash."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def remove(path: Path) -> bool:
    """Remove a file; False if it was not there or cannot be removed."""
    with suppress(OSError):
        path.unlink()
        return True
    return False


def write_error(error: OSError, path: Path) -> StoreWriteError:
    """The error a person can act on, for one of the operating system."""
    if error.errno in _FULL:
        advice = "the disk is full: free some space, or choose another folder for the store"
    elif error.errno in _FORBIDDEN:
        advice = "it is read-only for this process: grant write permission, or choose another folder"
    else:
        advice = f"{error.strerror or error}: check the disk and the path"
    return StoreWriteError(error.errno, f"cannot write to the store at {path}; {advice}")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file among all processes and threads; waits for it, and a crash releases it.

    Raises:
        OSError: the file cannot be created here.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        _unlock(descriptor)  # closing does too, unless a process was forked meanwhile and has it open still
        os.close(descriptor)


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock file together with others who share it; waits for one who has it alone.

    Where locks cannot be shared (Windows) it does nothing, and `no_others` is never sure.

    Raises:
        OSError: the file cannot be created here.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock_shared(descriptor)
        yield
    finally:
        _unlock(descriptor)
        os.close(descriptor)


def no_others(path: Path) -> bool:
    """Whether it is sure that nobody shares the lock file now."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return _is_alone(descriptor)
    finally:
        _unlock(descriptor)
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Take the lock without waiting; a descriptor to close when done, or None if somebody has it.

    Raises:
        OSError: the file cannot be created here.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, wait=False)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> None:
        # One byte far behind the content, which others may still read; LK_LOCK gives up after ten seconds.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if not (wait and error.errno == errno.EDEADLK):
                    raise
            else:
                return

    def _unlock(descriptor: int) -> None:
        """Closing does."""

    def _lock_shared(descriptor: int) -> None:
        """There are no shared locks."""

    def _is_alone(descriptor: int) -> bool:
        return descriptor < 0  # nobody can tell

else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> None:
        # flock, not lockf: it belongs to the open file, so it also keeps threads of one process apart.
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _lock_shared(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _is_alone(descriptor: int) -> bool:
        try:
            _lock(descriptor, wait=False)
        except OSError:
            return False
        return True

"""Keeps the index in step with the files, whatever happens to either.

| what happens                            | who mends it                                              |
|-----------------------------------------|-----------------------------------------------------------|
| a process dies between file and index   | its ids are noted before: whoever locks the store next    |
| the index is lost, damaged or foreign   | the next who needs it builds it from the files            |
| files come or go without us             | `sweep` and `check`; loads go by the files and are right  |
| the index cannot be written or opened   | nobody: the store goes on without it, says so once        |
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from kvrag.errors import StoreWriteError
from kvrag.store.base import EntryInfo
from kvrag.store.clock import StoreClock
from kvrag.store.files import remove
from kvrag.store.folder import EntryFolder
from kvrag.store.index import EntryIndex
from kvrag.store.index_file import Unbuilt, is_damage, remove_index
from kvrag.store.layout import Damaged, Manifest

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_TRIES = 8


class Ledger:
    """The index of one folder, opened when it is first needed; may be used from any thread.

    Args:
        folder: the entries' files.
        clock: the store's clock.
        eviction: name of the policy that gives priorities.
    """

    def __init__(self, folder: EntryFolder, clock: StoreClock, eviction: str) -> None:
        self.path = folder.path / "index.sqlite"
        self._folder = folder
        self._clock = clock
        self._eviction = eviction
        self._index: EntryIndex | None = None
        self._file = self._distrusted = (0, 0)
        self._is_read_only = self._has_warned = False
        self._guard = threading.RLock()
        self._held = threading.local()
        _LEDGERS.add(self)

    # --- the store's lock ---

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock; what a process left behind that died with it is mended first.

        Raises:
            OSError: the folder does not exist or is read-only.
        """
        with self._lock() as is_first:
            if is_first:
                self.settle(self.ask(EntryIndex.pending) or ())
            yield

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Hold the lock; whether this thread did not hold it before."""
        if getattr(self._held, "now", False):
            yield False
            return
        with self._folder.exclusive():
            self._held.now = True
            if self._is_read_only:
                self.close()  # it can be written after all: what changes now has to be noted
            try:
                yield True
            finally:
                self._held.now = False

    @contextmanager
    def changing(
        self, key_ids: Sequence[str], known: Mapping[str, Manifest] | None = None, *, floor: float = 0.0
    ) -> Iterator[None]:
        """Change the files of these entries; however that ends, the index says then what the files do.

        Args:
            key_ids: of all entries that may change. The caller holds the lock.
            known: manifests that need not be read again.
            floor: highest priority of those that are evicted.
        """
        self.ask(lambda index: index.begin(key_ids, floor))
        try:
            yield
        finally:
            self.settle(key_ids, known or {})

    def settle(self, key_ids: Sequence[str], known: Mapping[str, Manifest] | None = None) -> list[str]:
        """Make the index say what the files do; the caller holds the lock.

        Data without a manifest is removed. Entries without data, or with a manifest that is none, are set
        aside: they are misses already.

        Returns:
            Ids that were set aside.
        """
        if not key_ids:
            return []
        there, gone, damaged = [], [], []
        for key_id in key_ids:
            try:
                info = self.describe(key_id, (known or {}).get(key_id))
            except Damaged as damage:
                logger.warning("entry %s in %s is set aside: %s", key_id[:12], self._folder.path, damage)
                self._folder.set_aside(key_id)
                damaged.append(key_id)
                info = None
            if info is None:
                remove(self._folder.files(key_id)[1])
                gone.append(key_id)
            else:
                there.append(info)
        self.ask(lambda index: index.finish(there, gone, self._clock))
        return damaged

    def describe(self, key_id: str, manifest: Manifest | None = None) -> EntryInfo | None:
        """What the files say of an entry; None if there is none.

        Raises:
            Damaged: its manifest is none, or its data is missing.
        """
        if not self._folder.exists(key_id):
            return None
        if not self._folder.files(key_id)[1].exists():
            raise Damaged("its data is missing")
        manifest = manifest or self._folder.manifest(key_id)
        if manifest.expires is not None:
            self._clock.at_least(manifest.created)
        return EntryInfo(
            id=key_id,
            tenant=str(manifest.fingerprint.get("tenant", "")),
            num_bytes=self._folder.size(key_id),
            num_tokens=manifest.num_tokens,
            created=manifest.created,
            hits=0,
            cost_seconds=manifest.cost_seconds,
            expires=manifest.expires,
            pinned=self._folder.is_pinned(key_id),
        )

    def adopt(self, key_ids: Sequence[str]) -> None:
        """Take up entries that the index does not know, as far as they exist and it can be written."""
        try:
            with self.locked():
                self.settle([key_id for key_id in key_ids if self._folder.exists(key_id)])
        except OSError as error:
            self._warn(error)

    # --- the index ---

    def ask(self, work: Callable[[EntryIndex], T]) -> T | None:
        """What `work` gives for the index, which it may be given twice: damage is mended in between.

        None if there is no store yet, or the index cannot be used; the log says why, once.
        """
        for _ in range(_MAX_TRIES):
            try:
                if not self._is_current() and not self._open():
                    return None
                with self._guard:
                    if self._index is None:
                        continue  # closed by another thread since
                    return work(self._index)
            except Unbuilt:
                self._distrust()
            except StoreWriteError:
                raise  # what `work` says, not what happened to the index
            except sqlite3.ProgrammingError:
                continue  # closed by another thread since
            except sqlite3.Error as error:
                if not is_damage(error):
                    self._warn(error)
                    return None
                self._distrust()
            except OSError as error:
                self._warn(error)
                return None
        self._warn(RuntimeError("it is damaged again and again"))
        return None

    def page(self, after: str, tenant: str | None) -> list[EntryInfo] | None:
        """The next entries in the order of their ids (`EntryIndex.page`); None if there is no index."""
        return self.ask(lambda index: index.page(after, tenant))

    def sizes(self) -> tuple[int, int]:
        """Number of entries and their bytes; by looking at all files only where there can be no index."""
        if self.ask(EntryIndex.pending):
            with suppress(OSError), self.locked():  # whoever is at it ends first, or is dead and mended
                pass
        totals = self.ask(EntryIndex.totals)
        if totals is not None:
            return totals.entries, totals.num_bytes
        sizes = [self._folder.size(key_id) for key_id in self._folder.ids()]
        return len(sizes), sum(sizes)

    def rebuild(self) -> int:
        """Build the index from the files; the number of entries.

        Raises:
            OSError: the folder is read-only.
            sqlite3.Error: the index cannot be written.
        """
        with self._lock():
            self._build()
        return self.ask(lambda index: index.totals().entries) or 0

    def close(self) -> None:
        """Close the index; it is opened again when it is needed."""
        with self._guard:
            if self._index is not None:
                self._index.close()
                self._index = None

    def _is_current(self) -> bool:
        """Whether the index is open, and not one that somebody has replaced."""
        if self._index is None:
            return False
        try:
            return self._stat() == self._file
        except OSError:
            return False

    def _open(self) -> bool:
        """Open the index, or build it; False if there is no store yet."""
        if not self._folder.path.is_dir():
            return False
        try:
            with self._lock():
                self._open_locked()
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not self.path.exists():
                raise
            self._set(EntryIndex(self.path, self._eviction, read_only=True), is_read_only=True)
        return True

    def _open_locked(self) -> None:
        if not self.path.exists():
            self._build()
            return
        if self._stat() == self._distrusted:
            logger.warning("the index %s is damaged and is built from the files", self.path)
            self._build()
            return
        try:
            self._set(EntryIndex(self.path, self._eviction))
        except Unbuilt as error:
            logger.warning("the index %s is built from the files: %s", self.path, error)
            self._build()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            logger.warning("the index %s is built from the files: %s", self.path, error)
            self._build()

    def _build(self) -> None:
        self.close()
        remove_index(self.path)
        self._set(EntryIndex(self.path, self._eviction, build=self.described()))
        self.ask(lambda index: index.finish((), (), self._clock))

    def described(self) -> Iterator[EntryInfo]:
        """What the files say of all entries, one manifest after another."""
        for key_id in self._folder.ids():
            try:
                info = self.describe(key_id)
            except Damaged:
                continue  # for `sweep` and `check` to set aside
            if info is not None:
                yield info

    def _set(self, index: EntryIndex, *, is_read_only: bool = False) -> None:
        with self._guard:
            self.close()
            self._index, self._file, self._distrusted = index, self._stat(), (0, 0)
            self._is_read_only = is_read_only
            self._clock.merge(*index.clock_state())

    def _distrust(self) -> None:
        """Have the index built anew when it is opened next, unless somebody else has done it by then."""
        with self._guard:
            if self._index is not None:
                self._distrusted = self._file
            self.close()

    def _stat(self) -> tuple[int, int]:
        stat = os.stat(self.path)
        return stat.st_dev, stat.st_ino

    def _warn(self, error: Exception) -> None:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY:
            return  # a store on read-only media is nothing to warn of
        if not self._has_warned:
            logger.warning("the store %s goes on without its index: %s", self._folder.path, error)
        self._has_warned = True

    def before_fork(self) -> None:
        """Close the index: SQLite's locks do not survive in a child, which would believe to hold them."""
        self._guard.acquire()
        self.close()

    def after_fork(self) -> None:
        """Let others go on, in the parent and in the child."""
        self._guard.release()


_LEDGERS: weakref.WeakSet[Ledger] = weakref.WeakSet()
_forking = threading.local()


def _before_fork() -> None:
    _forking.ledgers = list(_LEDGERS)
    for ledger in _forking.ledgers:
        ledger.before_fork()


def _after_fork() -> None:
    for ledger in _forking.ledgers:
        ledger.after_fork()
    _forking.ledgers = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

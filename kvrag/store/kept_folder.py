"""What a store on disk does beside giving and taking rows: it is looked through, kept in order, and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.store.base import CheckReport, EntryInfo, SweepReport
from kvrag.store.counts import Counts
from kvrag.store.exchange import Exchange, check_id
from kvrag.store.files import write_error
from kvrag.store.filters import Filters
from kvrag.store.folder import EntryFolder, is_id
from kvrag.store.hits import Hits
from kvrag.store.layout import Damaged
from kvrag.store.ledger import Ledger
from kvrag.store.upkeep import Upkeep
from kvrag.store.writing import Writer


class KeptFolder:
    """The half of `DiskStore` that knows nothing of rows.

    Attributes:
        path: of the folder.
    """

    path: Path
    _folder: EntryFolder
    _ledger: Ledger
    _hits: Hits
    _counts: Counts
    _writer: Writer
    _exchange: Exchange
    _upkeep: Upkeep

    def entries(self, tenant: str | None = None) -> Iterator[EntryInfo]:
        """What is known of all entries, or those of one tenant, in the order of their ids.

        Entries may be deleted while they are listed; memory does not grow with their number.
        """
        self._hits.flush()
        page = self._ledger.page("", tenant)
        while page:
            yield from page
            page = self._ledger.page(page[-1].id, tenant)
        if page is None:  # there is no index: one manifest after another
            yield from (info for info in self._ledger.described() if tenant in (None, info.tenant))

    def info(self, key_id: str) -> EntryInfo | None:
        """What is known of one entry; None if there is none."""
        if not is_id(key_id) or not self._folder.exists(key_id):
            return None
        self._hits.flush()
        found = self._ledger.ask(lambda index: index.info(key_id))
        if found is None:
            with suppress(Damaged):
                found = self._ledger.describe(key_id)
        return found

    def files_of(self, key_id: str) -> tuple[Path, Path]:
        """Where manifest and data file of an entry lie, or would.

        Raises:
            ConfigError: no entry can have this name.
        """
        check_id(key_id)
        return self._folder.files(key_id)

    def counts(self) -> dict[str, int]:
        """What has happened since this was opened; see `Counting`."""
        names = ("damaged", "write_failures", "evictions", "evicted_bytes", "expired")
        return {name: self._counts[name] for name in names}

    def pin(self, key_id: str, pinned: bool = True) -> bool:
        """Never evict the entry, or let go of it; false if there is none.

        A pin is a file beside the entry: it needs no index, and holds again when a damaged entry is mended.
        It does not keep an entry from expiring, nor from `delete`.

        Raises:
            StoreWriteError: the folder cannot be written.
        """
        if not is_id(key_id) or not self._folder.exists(key_id):
            return False
        with self._writing():
            return self._writer.pin(key_id, pinned)

    def hold(self, key_ids: Iterable[str]) -> None:
        """Evict none of these before `release`: they are still to be uploaded.

        A hold is a file, like a pin, so it holds for all processes and across restarts; and it may come
        before its entry. `TieredStore` holds what it is to write back, and lets go of it when that is done.

        Raises:
            StoreWriteError: the folder cannot be written.
        """
        with self._writing():
            self._writer.hold([key_id for key_id in key_ids if is_id(key_id)], True)

    def release(self, key_ids: Iterable[str]) -> None:
        """Let these be evicted again.

        Raises:
            StoreWriteError: the folder cannot be written.
        """
        with self._writing():
            self._writer.hold([key_id for key_id in key_ids if is_id(key_id)], False)

    def held(self) -> list[str]:
        """Ids of all that are held, which takes a look at every file."""
        return list(self._folder.held())

    def sweep(self, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> SweepReport:
        """Remove what expired, what crashes left, and what is beyond the budget; mend the index.

        Args:
            dry_run: change nothing, and say what would be removed.
            grace_seconds: where nobody can tell whether a partial file is being written (Windows, or while
                others write), how old it has to be.

        Raises:
            StoreWriteError: the folder is read-only, or a file cannot be removed.
        """
        if dry_run:
            return self._upkeep.preview(grace_seconds)
        self._hits.flush()
        with self._writing():
            return self._upkeep.sweep(grace_seconds)

    def empty_quarantine(self, older_than_seconds: float, *, dry_run: bool = False) -> tuple[list[str], int]:
        """Remove damaged entries that were set aside longer ago than this; names of the files, and bytes.

        Raises:
            StoreWriteError: the folder is read-only.
        """
        with self._writing():
            return self._upkeep.empty_quarantine(older_than_seconds, dry_run=dry_run)

    def check(
        self,
        *,
        fix: bool = False,
        grace_seconds: float = 3600.0,
        progress: Callable[[int], None] | None = None,
    ) -> CheckReport:
        """Verify every byte of every entry, find files that belong to none, and compare the index.

        Args:
            fix: move damaged entries to `quarantine/`, remove orphans, mend the index.
            grace_seconds: as for `sweep`.
            progress: told the bytes of each entry once they are verified; may take its time.

        Raises:
            StoreWriteError: it cannot be mended, the folder is read-only.
        """
        with self._writing():
            return self._upkeep.check(fix=fix, grace_seconds=grace_seconds, progress=progress)

    def rebuild(self) -> int:
        """Build the index from the files, at any time; the number of entries. Counts of loads are lost.

        Raises:
            StoreWriteError: the folder is read-only.
        """
        with self._writing():
            return self._ledger.rebuild()

    def damage(self, key_id: str) -> str | None:
        """What is wrong with an entry's bytes, every one of them read; None if nothing is.

        Raises:
            CacheMiss: there is no such entry.
        """
        if not is_id(key_id) or not self._folder.exists(key_id):
            raise CacheMiss(f"no entry {key_id[:12]} in {self.path}")
        try:
            self._upkeep.verify(key_id)
        except Damaged as damage:
            return str(damage)
        return None

    def put_bytes(self, key_id: str, manifest: bytes, data: Sequence[bytes | memoryview]) -> bool:
        """Write an entry as it lies in another store; false if there is one of this id already.

        Args:
            key_id: of the entry.
            manifest: the content of its manifest.
            data: the content of its data file, in pieces.

        Raises:
            ConfigError: these are not the bytes of an entry.
            StoreWriteError: nothing was written; the message says what to do.
        """
        with self._writing():
            return self._exchange.put_bytes(key_id, manifest, data)

    def adopt(self, other: KeptFolder, key_id: str) -> bool:
        """Take an entry over from another store in the same file system; false if it is here already.

        Its files are renamed or, where the stores have not the same key, sealed anew: either way the other
        store has it no more afterwards.

        Raises:
            CacheMiss: the other store has no such entry.
            ConfigError: a store is encrypted, and was opened without its key.
            StoreWriteError: the files cannot be moved.
        """
        with self._writing():
            return self._exchange.adopt(other._exchange, key_id)

    def under_key(self, key_id: str, key: bytes | None) -> tuple[bytes, list[bytes | memoryview]]:
        """An entry as a store with this key, or without one, would have it: manifest, and data in pieces.

        Raises:
            CacheMiss: there is none, or it is damaged.
            ConfigError: it is encrypted, and the store was opened without its key.
        """
        return self._exchange.under_key(key_id, Filters(key=key))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Count what fails, and say what a person can do about it."""
        try:
            yield
        except StoreWriteError:
            self._counts.add("write_failures")
            raise
        except OSError as error:
            self._counts.add("write_failures")
            raise write_error(error, self.path) from error

"""Looking after a folder: proving everything that lies in it, and sweeping out what nobody needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from kvrag.errors import ConfigError
from kvrag.home import Home
from kvrag.index import Index
from kvrag.items import KEY_FIELD
from kvrag.portable.staging import abandoned, remove_abandoned
from kvrag.store.base import CheckReport
from kvrag.store.disk import DiskStore
from kvrag.store.references import References

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a scrub found.

    Attributes:
        records: documents in the collection.
        entries: caches in the store, which other collections may share.
        num_bytes: bytes of them, every one of which was read.
        store: damaged entries, orphans, and rows of the index that say other things than the files.
        stale: references to caches by documents, or spans of chats, that are not in the collection.
        unreferenced: those whose cache is there and that refer to none, so that another collection's
            deletion could take it.
        uncached: documents without a usable cache; they are read anew when they are asked for.
        fixed: what can be mended without a model was mended.
        spans: archived spans of chats.
        uncached_spans: those without a usable cache; they are read anew when they are needed.
    """

    records: int
    entries: int
    num_bytes: int
    store: CheckReport
    stale: tuple[str, ...]
    unreferenced: tuple[str, ...]
    uncached: tuple[str, ...]
    fixed: bool
    spans: int = 0
    uncached_spans: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is wrong. Documents without a cache are slow, not wrong."""
        return self.store.ok and not (self.stale or self.unreferenced)


def verify(
    home: Home, *, fix: bool = False, bytes_per_second: float | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Read every byte of every cache, and compare the index with the files and references with documents.

    Args:
        home: what to scrub.
        fix: set damaged caches aside, remove orphans, mend index and references.
        bytes_per_second: read no faster, so that answers do not wait for the disk.
        progress: told after every cache.

    Raises:
        InputError: nothing was ingested here.
        ConfigError: a rate that is none.
    """
    if bytes_per_second is not None and not bytes_per_second > 0:
        raise ConfigError(f"bytes_per_second={bytes_per_second}: expected more than 0")
    home.settings()
    with closing(home.store()) as store:
        before = store.stats()
        check = store.check(fix=fix, progress=_pace(before.num_bytes, bytes_per_second, progress))
        bad = set() if fix else set(check.damaged)
        with closing(References.beside(store)) as references:
            with closing(home.index()) as index:
                documents = _compare(index, store, references, bad, fix=fix)
            spans = _Compared(0)
            if home.has_archive():
                with closing(home.archive_index()) as index:
                    spans = _compare(index, store, references, bad, fix=fix)
        return VerifyReport(
            records=documents.records,
            entries=before.entries,
            num_bytes=before.num_bytes,
            store=check,
            stale=(*documents.stale, *spans.stale),
            unreferenced=(*documents.unreferenced, *spans.unreferenced),
            uncached=documents.uncached,
            fixed=fix,
            spans=spans.records,
            uncached_spans=spans.uncached,
        )


def _pace(total: int, bytes_per_second: float | None, progress: Progress | None) -> Callable[[int], None]:
    """Counts bytes, tells of them, and waits where they come too fast."""
    started, done = time.monotonic(), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, max(done, total))
        if bytes_per_second is not None:
            time.sleep(max(0.0, started + done / bytes_per_second - time.monotonic()))

    return count


@dataclass(frozen=True, slots=True)
class _Compared:
    """How many records a collection has, and the ids of those with which something is not as it should be."""

    records: int
    stale: tuple[str, ...] = ()
    unreferenced: tuple[str, ...] = ()
    uncached: tuple[str, ...] = ()


def _compare(
    index: Index, store: DiskStore, references: References, damaged: set[str], *, fix: bool
) -> _Compared:
    """Records with stale references, without a reference, and without a usable cache."""
    named, seen = references.of(index.id), set()
    unreferenced: dict[str, str] = {}
    uncached = []
    for record in index.records():
        seen.add(record.id)
        label = str(record.metadata.get(KEY_FIELD, ""))
        key_id = named.get(record.id, label)
        if key_id not in store or key_id in damaged:
            uncached.append(record.id)
        elif record.id not in named:
            unreferenced[record.id] = label
    stale = sorted(set(named) - seen)
    if fix:
        references.add(index.id, unreferenced)
        references.collect(references.remove(index.id, stale), store.delete)
    return _Compared(len(seen), tuple(stale), tuple(sorted(unreferenced)), tuple(sorted(uncached)))


@dataclass(frozen=True, slots=True)
class Rubbish:
    """One kind of what nobody needs.

    Attributes:
        kind: "expired", "orphans", "unreferenced", "beyond the budget", "quarantine" or "imports".
        names: ids of entries, or files within the folder.
        num_bytes: of all of them.
    """

    kind: str
    names: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What `collect` removed, or would remove."""

    rubbish: tuple[Rubbish, ...] = field(default_factory=tuple)
    dry_run: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(some.num_bytes for some in self.rubbish)


def collect(home: Home, *, quarantine_seconds: float = 30 * DAY, dry_run: bool = False) -> SweepResult:
    """Remove what nobody needs.

    That is: caches whose time to live is over, what crashes left behind, caches that no document of any
    collection refers to (answers of other models leave them), what is beyond the budget, damaged entries that
    were set aside long ago, and what killed imports left. Deleted texts that an embedded Chroma still holds
    are overwritten, too.

    Args:
        home: where to sweep.
        quarantine_seconds: how long damaged entries are kept for a person to look at.
        dry_run: change nothing, and say what would be removed.

    Raises:
        InputError: nothing was ingested here.
        StoreWriteError: the folder is read-only.
    """
    home.settings()
    with closing(home.store()) as store:
        preview = store.sweep(dry_run=True)
        sizes = {name: _size(store, name) for name in (*preview.expired, *preview.evicted, *preview.orphans)}
        swept = preview if dry_run else store.sweep()
        found = [
            Rubbish(kind, names, sum(sizes.get(name, 0) for name in names))
            for kind, names in (
                ("expired", swept.expired),
                ("beyond the budget", swept.evicted),
                ("orphans", swept.orphans),
            )
        ]
        found.append(_unreferenced(store, {*swept.expired, *swept.evicted}, dry_run=dry_run))
        names, num_bytes = store.empty_quarantine(quarantine_seconds, dry_run=dry_run)
        found.append(Rubbish("quarantine", (*swept.quarantined, *names), num_bytes))
    found.append(_imports(home, dry_run=dry_run))
    if not dry_run:
        with closing(home.index()) as index:
            index.forget()
        if home.has_archive():
            with closing(home.archive_index()) as index:
                index.forget()
    return SweepResult(tuple(some for some in found if some.names), dry_run)


def _size(store: DiskStore, name: str) -> int:
    """Bytes of an entry, or of a file within the store."""
    info = store.info(name)
    if info is not None:
        return info.num_bytes
    file = store.path / name
    return file.stat().st_size if file.is_file() else 0


def _unreferenced(store: DiskStore, spared: set[str], *, dry_run: bool) -> Rubbish:
    """Caches that no document of any collection refers to."""
    sizes: dict[str, int] = {}

    def erase(key_id: str) -> bool:
        sizes[key_id] = _size(store, key_id)
        return dry_run or bool(store.delete(key_id))

    candidates = (key_id for key_id in store.ids() if key_id not in spared)
    with closing(References.beside(store)) as references:
        gone = references.collect(candidates, erase)
    return Rubbish("unreferenced", tuple(gone), sum(sizes[key_id] for key_id in gone))


def _imports(home: Home, *, dry_run: bool) -> Rubbish:
    """Folders that killed imports left behind."""
    left = abandoned(home)
    size = sum(file.stat().st_size for folder in left for file in folder.rglob("*") if file.is_file())
    if not dry_run:
        remove_abandoned(home)
    return Rubbish("imports", tuple(folder.name for folder in left), size)

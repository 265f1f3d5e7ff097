"""Looking after a folder of entries: what is wrong with it, what is too much, and putting that right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvrag.store import layout
from kvrag.store.base import CheckReport, SweepReport
from kvrag.store.clock import StoreClock
from kvrag.store.files import remove
from kvrag.store.folder import EntryFolder, Listing
from kvrag.store.index import EntryIndex, Victim
from kvrag.store.layout import Damaged
from kvrag.store.ledger import Ledger
from kvrag.store.room import Limits


class Upkeep:
    """Sweeps and checks one folder, while others read and write it.

    It looks without the lock, and looks again with it at what seems wrong before anything is changed.

    Args:
        folder: the entries' files.
        ledger: their index.
        clock: the store's clock.
        limits: how much may be there.
        evict: erases entries; the caller of it holds the lock.
        set_aside: moves a damaged entry to quarantine, unless it has changed since it looked like that.
    """

    def __init__(
        self,
        folder: EntryFolder,
        ledger: Ledger,
        clock: StoreClock,
        limits: Limits,
        evict: Callable[[Sequence[Victim]], None],
        set_aside: Callable[[str, str, tuple[tuple[int, int, int], ...]], None],
    ) -> None:
        self._folder = folder
        self._ledger = ledger
        self._clock = clock
        self._limits = limits
        self._evict = evict
        self._set_aside = set_aside

    def sweep(self, grace_seconds: float) -> SweepReport:
        """Remove what nobody can use, and what is too much.

        Raises:
            OSError: the folder is read-only, or a file cannot be removed.
        """
        adopted, forgotten, damaged, orphans, num_bytes = [], [], [], [], 0
        for prefix in self._prefixes():
            listing = self._folder.names(prefix)
            known = self._known(prefix)
            files = self._orphans(prefix, listing, grace_seconds)
            if not files and (known is None or known == listing.entries):
                continue
            with self._ledger.locked():
                differing = sorted((known or set()) ^ listing.entries) if known is not None else []
                damaged += self._ledger.settle(differing)
                there = {key_id for key_id in differing if self._folder.exists(key_id)}
                adopted += [key_id for key_id in differing if key_id in there and key_id not in (known or ())]
                forgotten += [
                    key_id for key_id in differing if key_id not in there and key_id in (known or ())
                ]
                for file, size in self._remove(self._still_orphans(files, grace_seconds)):
                    orphans.append(self._name(file))
                    num_bytes += size
        expired, expired_bytes = self._remove_expired()
        evicted = self._keep_budget()
        quarantined, quarantined_bytes = self._empty_quarantine()
        return SweepReport(
            expired=tuple(expired),
            orphans=tuple(orphans),
            quarantined=tuple(quarantined),
            damaged=tuple(damaged),
            evicted=tuple(victim.id for victim in evicted),
            adopted=tuple(adopted),
            forgotten=tuple(forgotten),
            num_bytes=num_bytes + expired_bytes + quarantined_bytes + sum(v.num_bytes for v in evicted),
        )

    def preview(self, grace_seconds: float) -> SweepReport:
        """What `sweep` would remove now; what it would only mend in the index is left out."""
        files = [
            file
            for prefix in self._prefixes()
            for file in self._orphans(prefix, self._folder.names(prefix), grace_seconds)
        ]
        now = self._clock.now()
        expired = [key_id for key_id in self._expired(now) if self._is_expired(key_id, now)]
        evicted = self._ledger.ask(lambda index: self._surplus(index, now)) or []
        num_bytes = sum(file.stat().st_size for file in files) + sum(map(self._folder.size, expired))
        return SweepReport(
            expired=tuple(expired),
            orphans=tuple(map(self._name, files)),
            evicted=tuple(victim.id for victim in evicted),
            num_bytes=num_bytes + sum(victim.num_bytes for victim in evicted),
        )

    def empty_quarantine(self, older_than_seconds: float, *, dry_run: bool) -> tuple[list[str], int]:
        """Remove files that were set aside longer ago, by the time in their names; or only name them.

        Raises:
            OSError: the folder is read-only.
        """
        folder = self._folder.path / "quarantine"
        if not folder.is_dir():
            return [], 0
        before = (self._clock.now() - older_than_seconds) * 1e9
        old = [file for file in sorted(folder.iterdir()) if _set_aside_at(file) <= before]
        sizes = [file.stat().st_size for file in old]
        if not dry_run and old:
            with self._ledger.locked():
                sizes = [size for _, size in self._remove(old)]
        return [self._name(file) for file in old], sum(sizes)

    def check(
        self, *, fix: bool, grace_seconds: float, progress: Callable[[int], None] | None = None
    ) -> CheckReport:
        """Verify every byte of every entry, find files that belong to none, and compare the index."""
        damaged: list[str] = []
        orphans: list[str] = []
        wrong: list[str] = []
        for prefix in self._prefixes():
            listing = self._folder.names(prefix)
            damaged += self._check_entries(listing, progress, fix=fix)
            files = self._orphans(prefix, listing, grace_seconds)
            orphans += map(self._name, files)
            if fix and files:
                with self._ledger.locked():
                    for _ in self._remove(self._still_orphans(files, grace_seconds)):
                        pass
            wrong += self._check_index(prefix, listing, set(damaged), fix=fix)
        if self._ledger.ask(EntryIndex.wrong_sums):
            wrong.append("totals")
            if fix:
                self._ledger.rebuild()
        return CheckReport(tuple(damaged), tuple(orphans), tuple(wrong), fixed=fix)

    def verify(self, key_id: str) -> None:
        """Prove an entry by itself: every byte, and that its content gives its name.

        Raises:
            Damaged: something differs.
        """
        manifest = self._folder.manifest(key_id)
        data = layout.map_file(self._folder.files(key_id)[1], manifest)
        layout.verify(data, manifest)
        layout.prove_name(data, manifest, key_id, self._folder.filters)

    def _check_entries(
        self, listing: Listing, progress: Callable[[int], None] | None, *, fix: bool
    ) -> list[str]:
        damaged = []
        for key_id in sorted(listing.entries):
            signature = self._folder.signature(key_id)
            if signature is None:
                continue
            try:
                self.verify(key_id)
            except Damaged as damage:
                if self._folder.signature(key_id) != signature:
                    continue  # it was being replaced while we read it
                damaged.append(key_id)
                if fix:
                    self._set_aside(key_id, str(damage), signature)
            if progress is not None:
                progress(sum(size for _, size, _ in signature))
        return damaged

    def _check_index(self, prefix: str, listing: Listing, damaged: set[str], *, fix: bool) -> list[str]:
        """Ids whose row is not what the files say; looked at again with the lock held."""
        known = self._ledger.ask(lambda index: index.sizes(prefix))
        if known is None:
            return []
        suspects = [
            key_id
            for key_id in sorted((listing.entries | set(known)) - damaged)
            if known.get(key_id) != self._folder.size(key_id)
        ]
        if not suspects:
            return []
        try:
            with self._ledger.locked():
                wrong = [key_id for key_id in suspects if self._differs(key_id)]
                if fix:
                    self._ledger.settle(wrong)
                return wrong
        except OSError:
            return suspects  # read-only: nobody can mend it here

    def _differs(self, key_id: str) -> bool:
        row = self._ledger.ask(lambda index: index.info(key_id))
        return (row.num_bytes if row else None) != (self._folder.size(key_id) or None)

    def _known(self, prefix: str) -> set[str] | None:
        """Ids that the index has of one folder; None if there is no index."""
        return self._ledger.ask(lambda index: set(index.sizes(prefix)))

    def _prefixes(self) -> Iterator[str]:
        """Names of the folders to look into: those there are, and those that the index thinks there are."""
        there = self._folder.prefixes()
        known = self._ledger.ask(EntryIndex.prefixes)
        yield from sorted({*there, *(known or ())})

    def _orphans(self, prefix: str, listing: Listing, grace_seconds: float) -> list[Path]:
        folder = self._folder.path / prefix
        partial = self._folder.left_behind([folder / name for name in listing.partial], grace_seconds)
        lone = [self._folder.files(key_id)[1] for key_id in sorted(listing.orphans)]
        return sorted(partial) + [file for file in lone if self._is_lone(file)]

    def _still_orphans(self, files: Sequence[Path], grace_seconds: float) -> list[Path]:
        """Those of them that are orphans still, now that nobody commits."""
        partial = [file for file in files if file.suffix == ".partial"]
        lone = [file for file in files if file.suffix != ".partial" and self._is_lone(file)]
        return self._folder.left_behind(partial, grace_seconds) + lone

    @staticmethod
    def _is_lone(data: Path) -> bool:
        return data.exists() and not data.with_suffix(".json").exists()

    @staticmethod
    def _remove(files: Sequence[Path]) -> Iterator[tuple[Path, int]]:
        for file in files:
            try:
                size = os.stat(file).st_size
            except OSError:
                continue
            if remove(file):
                yield file, size

    def _remove_expired(self) -> tuple[list[str], int]:
        now = self._clock.now()
        candidates = self._expired(now)
        if not candidates:
            return [], 0
        expired, num_bytes = [], 0
        with self._ledger.locked(), self._ledger.changing(candidates):
            for key_id in candidates:
                if self._is_expired(key_id, now):
                    expired.append(key_id)
                    remove(self._folder.pin_file(key_id))
                    remove(self._folder.held_file(key_id))
                    num_bytes += self._folder.erase(key_id)
        return expired, num_bytes

    def _expired(self, now: float) -> list[str]:
        """Ids whose time to live is over, as far as the index knows."""
        found = self._ledger.ask(lambda index: index.expired(now))
        if found is not None:
            return found
        return [i.id for i in self._ledger.described() if i.expires is not None and i.expires <= now]

    def _is_expired(self, key_id: str, now: float) -> bool:
        """Whether the files say so, too: it may have been put again since."""
        try:
            expires = self._folder.manifest(key_id).expires
        except Damaged:
            return False
        return expires is not None and expires <= now

    def _keep_budget(self) -> list[Victim]:
        now = self._clock.now()
        if not self._ledger.ask(lambda index: self._surplus(index, now)):
            return []
        with self._ledger.locked():
            victims = self._ledger.ask(lambda index: self._surplus(index, now)) or []
            self._evict(victims)
        return victims

    def _surplus(self, index: EntryIndex, now: float) -> list[Victim]:
        return self._limits.surplus(index, now, self._folder.is_held)

    def _empty_quarantine(self) -> tuple[list[str], int]:
        folder = self._folder.path / "quarantine"
        if not folder.is_dir():
            return [], 0
        with self._ledger.locked():
            removed = self._folder.empty_quarantine()
        return [self._name(file) for file, _ in removed], sum(size for _, size in removed)

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self._folder.path))


def _set_aside_at(file: Path) -> float:
    """When a file was moved to quarantine, in nanoseconds since 1970; 0 if its name does not say."""
    try:
        return float(file.name.split(".")[1])
    except (IndexError, ValueError):
        return 0.0

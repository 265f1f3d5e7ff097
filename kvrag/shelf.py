"""Documents by name, on disk, with caches that live and die with them: for frameworks' document stores.

A `kvrag.records.RecordFile` and a `kvrag.companion.Companion` in step. Caches are built before the file is
locked, so that nobody waits for the model; what the file says and who refers to which cache change together
while it is locked. A crash in between leaves at worst what `Shelf.reconcile` mends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from kvrag.companion import Companion, CompanionReport
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError, KVRagError
from kvrag.ingested import known_of
from kvrag.lockstep import Progress, batches
from kvrag.prompt import RagPrompt
from kvrag.records import Record, RecordFile, written


class Shelf:
    """Documents in a folder and their caches in an engine's store.

    May be used from any thread; processes can share the folder. A document that cannot have a cache (empty,
    or longer than the model reads) is kept without one. So are all if the engine has no store.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: Engine,
        form: RagPrompt,
        *,
        remember: int = 10_000,
        retrieved: Callable[[list[str]], object] | None = None,
        batch_size: int = 32,
    ) -> None:
        """Open the folder, and make it if need be.

        Args:
            folder: where the documents are kept.
            engine: whose caches these are.
            form: of the prompts that documents are encoded for.
            remember: most documents of a folder that is opened, whose texts are looked for in prompts at
                once; others are when they are asked for.
            retrieved: told the texts that somebody asked for; they will probably stand in a prompt.
            batch_size: documents that are encoded and written together.

        Raises:
            StoreWriteError: the folder cannot be written to.
            CorpusError: its file is damaged, or of another version.
            ConfigError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        self._file = RecordFile(folder)
        self._known, self._retrieved, self._batch_size = known_of(engine), retrieved, batch_size
        self._companion: Companion | None = None
        if engine.store is not None:
            self._companion = Companion(
                self._file.id, engine.store, engine.encoder(form), batch_size=batch_size
            )
        self._changing = threading.RLock()
        if 0 < self._file.count() <= remember:
            # Seen, not ingested once more: one deletion is enough for them to be unknown.
            self._known.see(record.text for _, record in self._file.records() if record.text)

    def get(self, names: Iterable[str]) -> list[Record | None]:
        """Records in the order of the names, each as often as it is named; None where there is none.

        Raises:
            CorpusError: the file is damaged.
            InputError: a name is not text.
        """
        names = _checked(names)
        found = self._file.get(names)
        texts = [record.text for record in found.values() if record.text]
        if texts:
            self._known.see(texts)
            if self._retrieved is not None:
                self._retrieved(texts)
        return [found.get(name) for name in names]

    def set(self, records: Mapping[str, Record], progress: Progress | None = None) -> None:
        """Add or replace records. Can be interrupted and repeated: whole batches stay.

        Args:
            records: by name.
            progress: called after every batch.

        Raises:
            InputError: a name is not text, or JSON does not keep a field; nothing has changed.
            CorpusLocked: another process has been writing for half a minute.
            StoreWriteError: the disk is full, or read-only.
        """
        names = _checked(records)
        rows = {name: written(name, records[name]) for name in names}
        done = 0
        for batch in batches(names, self._batch_size):
            self._set({name: records[name].text for name in batch}, {name: rows[name] for name in batch})
            done += len(batch)
            if progress is not None:
                progress(done, len(names))

    def delete(self, names: Iterable[str]) -> None:
        """Remove records, and the caches that nobody else needs; names that are not there are no error.

        Raises:
            InputError: a name is not text.
            CorpusLocked: another process has been writing for half a minute.
            StoreWriteError: the disk is full, or read-only; nothing has changed.
        """
        names = _checked(names)
        with self._changing:
            with self._in_step(names):
                before = self._texts(names)
                self._file.remove(before)
                if self._companion is not None:
                    self._companion.drop(names)
            self._known.remove(text for text in before.values() if text)

    def names(self, prefix: str = "") -> Iterator[list[str]]:
        """Names that begin so, in order and in pages; the file is free between them."""
        (prefix,) = _checked([prefix])
        return self._file.names(prefix)

    def reconcile(self, progress: Progress | None = None) -> CompanionReport:
        """Make the caches what the file says, after a crash, or for another model or store.

        What is there already is not built again, so that an interrupted call can be repeated. Changes by
        other threads wait; other processes should make none meanwhile, or what they add may lack its cache.

        Args:
            progress: called after every batch.

        Raises:
            ConfigError: the engine keeps no caches.
        """
        if self._companion is None:
            raise ConfigError("the engine has no store to keep caches in; make it with store=...")
        with self._changing:
            total = self._file.count()
            told = ((name, record.text) for name, record in self._file.records())
            return self._companion.reconcile(told, total=total, progress=progress)

    def close(self) -> None:
        """Let go of the folder and of the references; the engine stays open."""
        self._file.close()
        if self._companion is not None:
            self._companion.close()

    def _set(self, texts: dict[str, str], rows: dict[str, str]) -> None:
        companion = self._companion
        built = companion.prepared(texts.values()) if companion is not None else nullcontext()
        with built, self._changing:
            with self._in_step(texts):
                before = self._texts(texts)
                self._file.put(rows)
                if companion is not None:
                    companion.collect(companion.refer(texts))
            self._known.remove(text for text in before.values() if text)
            self._known.add(text for text in texts.values() if text)

    def _texts(self, names: Iterable[str]) -> dict[str, str]:
        return {name: record.text for name, record in self._file.get(names).items()}

    @contextmanager
    def _in_step(self, names: Iterable[str]) -> Iterator[None]:
        """One change of the file; if it fails, the references say again what the file has."""
        try:
            with self._file.writing():
                yield
        except BaseException:
            if self._companion is not None:
                with suppress(KVRagError):  # the first error is the one to tell
                    texts = self._texts(names)
                    self._companion.drop(name for name in names if name not in texts)
                    self._companion.collect(self._companion.refer(texts))
            raise


def _checked(names: Iterable[str]) -> list[str]:
    """Each name, as text that can be written.

    Raises:
        InputError: it is something else.
    """
    listed = list(names)
    for name in listed:
        if not isinstance(name, str):
            raise InputError(f"{name!r} is no name for a document: names are text")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name!r} is no name for a document: half a character ({error})") from error
    return listed

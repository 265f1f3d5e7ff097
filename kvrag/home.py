"""A folder that holds a collection, its caches and the settings they were made with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from kvrag.archive.archive import Archive
from kvrag.archive.sealing import KEY_ID
from kvrag.collection import Embedding
from kvrag.config import ALONE, BEFORE, Context, store_key
from kvrag.corpus import Corpus
from kvrag.documents import Document, split
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError
from kvrag.index import Index
from kvrag.lockstep import Progress
from kvrag.model import READER
from kvrag.prompt import RagPrompt
from kvrag.reports import IngestReport
from kvrag.segments import KV
from kvrag.sessions.vault import Vault
from kvrag.store.base import Receipt
from kvrag.store.disk import DiskStore
from kvrag.store.files import PARTIAL, commit, write_error, write_partial
from kvrag.store.key import Fingerprint
from kvrag.store.references import References
from kvrag.store.tenants import Tenant
from kvrag.stores import key_of

CHUNK_TOKENS = 512
_ARCHIVE = "-archive"  # behind the name of the collection whose chats it is of


@dataclass(frozen=True, slots=True)
class Settings:
    """What a folder was made with.

    Attributes:
        model: the one used last for ingestion.
        forms: the prompt's form for each model; kept because templates may write today's date, and
            documents are encoded behind what stood there at ingestion.
        chroma: address of the Chroma server that holds the collection; None: the embedded database.
        codec: how caches are written, by name.
        budget_bytes: how much all caches together may take; None: no limit.
        ttl_seconds: time to live of caches that are written from now on; None: no end.
    """

    model: str
    forms: dict[str, RagPrompt]
    chroma: str | None = None
    codec: str = "raw"
    budget_bytes: int | None = None
    ttl_seconds: float | None = None


class _NoEncoder:
    """Stands in for a model where none is needed: listing, removing, counting."""

    max_tokens = 0

    @property
    def fingerprint(self) -> Fingerprint:
        raise ConfigError("no model is loaded")

    def tokenize(self, text: str) -> tuple[int, ...]:
        raise ConfigError("no model is loaded")

    def encode(self, token_lists: Sequence[tuple[int, ...]]) -> list[KV]:
        raise ConfigError("no model is loaded")


class Home:
    """Opens what lies in a folder: `chroma/`, `store/`, `archive/`, `settings.json`."""

    def __init__(
        self,
        path: str | Path,
        *,
        chroma: str | None = None,
        collection: str = "kvrag",
        tenant: Tenant | None = None,
    ) -> None:
        """Name the folder; nothing is created yet.

        Args:
            path: the folder.
            chroma: address of a Chroma server (http...); default: the one of the first ingestion, else
                the embedded database.
            collection: name of the collection.
            tenant: whose it is; a tenant's collection of this name is not another's.
        """
        self.path = Path(path)
        self.tenant = tenant
        self._chroma = chroma
        self._named = collection
        self._collection = f"{collection}-{tenant.digest}" if tenant else collection
        self._chosen: dict[str, Any] = {}

    def exists(self) -> bool:
        """Whether something was ingested here."""
        return (self.path / "settings.json").exists()

    def settings(self) -> Settings:
        """What the folder was made with.

        Raises:
            InputError: nothing was ingested here, or the file is broken.
        """
        file = self.path / "settings.json"
        try:
            raw = json.loads(file.read_text())
            forms = {name: RagPrompt(**form) for name, form in raw["forms"].items()}
            known = {field.name for field in fields(Settings)} & set(raw)
            return Settings(**{**{name: raw[name] for name in known}, "forms": forms})
        except FileNotFoundError as error:
            raise InputError(f"nothing was ingested in {self.path}; run: kvrag ingest PATH") from error
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is broken ({error}); remove it and run: kvrag ingest PATH") from error

    def model(self) -> str:
        """The model used last; the shipped reader if nothing was ingested yet."""
        return self.settings().model if self.exists() else READER

    def codec(self) -> str:
        """How caches are written here."""
        return self.settings().codec if self.exists() else "raw"

    def form(self, engine: Engine) -> RagPrompt:
        """The prompt's form for a model: the one of ingestion, else the template's."""
        known = self.settings().forms if self.exists() else {}
        return known.get(engine.model.name) or RagPrompt.of(engine.model.text)

    def remember(self, engine: Engine, form: RagPrompt) -> None:
        """Note model, form and codec for later questions."""
        before = self.settings() if self.exists() else Settings(engine.model.name, {})
        forms = {**before.forms, engine.model.name: form}
        self._save(replace(before, model=engine.model.name, forms=forms, codec=engine.codec))

    def take_over(self, settings: Settings) -> None:
        """Note what an imported collection was made with, where nothing is known of it here."""
        if not self.exists():
            self._save(settings)
            return
        ours = self.settings()
        merged = {**settings.forms, **ours.forms}
        if merged != ours.forms:
            self._save(replace(ours, forms=merged))

    def change(self, **settings: Any) -> None:
        """Change settings for all later commands; in an empty folder from its first ingestion on."""
        self._chosen.update(settings)
        if self.exists():
            self._save(self.settings())

    def _save(self, settings: Settings) -> None:
        raw = {**asdict(settings), **self._chosen, "chroma": self._server()}
        file = self.path / "settings.json"
        partial = file.with_name(f"settings.{os.getpid()}{PARTIAL}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_partial(partial, [json.dumps(raw, indent=1).encode()])
            commit(partial, file)
        except OSError as error:
            raise write_error(error, file) from error

    def store(self) -> DiskStore:
        """The caches, within the folder's budget, and encrypted if there is a KVRAG_STORE_KEY.

        Raises:
            ConfigError: they are encrypted with another key, or the key is none.
        """
        settings = replace(self.settings() if self.exists() else Settings("", {}), **self._chosen)
        return DiskStore(
            self.path / "store",
            budget_bytes=settings.budget_bytes,
            ttl_seconds=settings.ttl_seconds,
            key=store_key(),
        )

    def index(self, *, embedding: Embedding | None = None) -> Index:
        """The collection; a new one gets this embedding, or the default."""
        return Index.open(self._database(), self._collection, embedding=embedding)

    def has_collection(self) -> bool:
        """Whether the collection is there."""
        return Index.exists(self._database(), self._collection)

    def must_exist(self) -> None:
        """See to it that there is something to work on.

        Raises:
            InputError: nothing was ingested here, or there is no such collection.
        """
        self.settings()
        if not self.has_collection():
            if self.tenant is not None:
                raise InputError(
                    f"tenant {self.tenant.name!r} has no collection {self._named!r} in {self.path}, "
                    "or has it with another secret; run: kvrag ingest PATH, or give the secret of then"
                )
            raise InputError(
                f"there is no collection {self._named!r} in {self.path}; run: kvrag ingest PATH, "
                "or name another with --collection"
            )

    def archive_index(self, *, embedding: Embedding | None = None) -> Index:
        """The collection of what chats have said; a new one gets this embedding, or the default.

        It has a folder of its own beside the documents', so that chats and ingestion do not wait for each
        other: of one folder, only one process writes at a time.
        """
        return Index.open(self._archive_database(), self._archive_collection, embedding=embedding)

    def has_archive(self) -> bool:
        """Whether chats were archived here."""
        return Index.exists(self._archive_database(), self._archive_collection)

    def archive(self, engine: Engine | None = None, *, embedding: Embedding | None = None) -> Archive:
        """What chats have said, for an engine whose caches lie here; without one only to list and delete.

        Raises:
            ConfigError: the engine works for another tenant, or the archive is encrypted with another key.
        """
        if engine is not None:
            self._require_tenant(engine)
        mine = None if engine is None else engine.store
        fingerprint = engine.fingerprint() if engine is not None else _nobodys(self.tenant)
        with ExitStack() as opened:  # closed again if it cannot be used
            index = opened.enter_context(closing(self.archive_index(embedding=embedding)))
            store = mine or opened.enter_context(closing(self.store()))
            archive = Archive(index, store, fingerprint, closes_store=mine is None)
            opened.pop_all()
            return archive

    def vault(self) -> Vault:
        """What conversations that are kept here are encrypted with, and whose they are."""
        return Vault.of(key_of(None), self.tenant)

    def sealed_archives(self) -> tuple[str | Path, list[str]]:
        """Where chats are archived, and the collections of those that are encrypted, other tenants' too."""
        database = self._archive_database()
        names = Index.names(database, having=KEY_ID)
        return database, [name for name in names if name.endswith(_ARCHIVE)]

    @property
    def sessions(self) -> Path:
        """The folder of conversations that are kept."""
        return self.path / "sessions"

    @property
    def _archive_collection(self) -> str:
        return f"{self._collection}{_ARCHIVE}"

    def _archive_database(self) -> str | Path:
        return self._server() or self.path / "archive"

    def _database(self) -> str | Path:
        return self._server() or self.path / "chroma"

    def _require_tenant(self, engine: Engine) -> None:
        if engine.tenant != self.tenant:
            raise ConfigError("the engine's tenant is not the folder's: give both the same, or none")

    def _server(self) -> str | None:
        return self._chroma or (self.settings().chroma if self.exists() else None)

    def corpus(self, engine: Engine | None = None, *, context: Context | None = None) -> Corpus:
        """Collection and caches together; without an engine only for listing, removing and counting.

        Args:
            engine: reads the documents, for the tenant whose folder this is opened for.
            context: what documents are encoded behind, if the collection has no choice of its own yet; None:
                as it is, and behind the parts before them in a new collection.

        Raises:
            ConfigError: the engine works for another tenant.
        """
        index = self.index()
        if engine is None:
            return Corpus(index, self.store(), _NoEncoder())
        self._require_tenant(engine)
        store = engine.store or self.store()
        return Corpus(index, store, engine.encoder(self.form(engine)), context=_fitting(index, context))

    def sweep(self) -> tuple[Receipt, ...]:
        """Remove caches that no document refers to: those that answers of other models left behind.

        Without it, a removed document's bytes would stay until the next `reconcile`.

        Returns:
            What was erased.
        """
        store = self.store()
        references = References(store.path / "references.sqlite")
        receipts: list[Receipt] = []

        def erase(key_id: str) -> Receipt:
            receipts.append(store.delete(key_id))
            return receipts[-1]

        try:
            references.collect(store.ids(), erase)
        finally:
            references.close()
            store.close()
        return tuple(receipts)


def ingest(
    home: Home,
    engine: Engine,
    documents: Iterable[Document],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    by_paragraph: bool = False,
    context: Context | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Cut documents into chunks and bring a folder's collection and caches up to date with them.

    Chunks that are there already are kept, and read anew if this model has no caches of them; chunks of the
    same files that are not in the documents any more are removed. Pages of one file are one document.

    With a `context`, all chunks of the collection are encoded behind that; None leaves it as it is, and in a
    new collection encodes each chunk behind the parts before it in its document.

    Raises:
        InputError: there is no text in the documents.
    """
    form = home.form(engine)
    encoder = engine.encoder(form)
    documents = list(documents)
    chunks = [
        (chunk, {**document.metadata, "source": document.source})
        for document in documents
        for chunk in chunks_of(document.text, encoder, chunk_tokens, by_paragraph=by_paragraph)
    ]
    if not chunks:
        raise InputError("no text found in the given files")
    home.remember(engine, form)
    with home.corpus(engine, context=context) as corpus:
        files = {file_of(document.source) for document in documents}
        before = {r.id for r in corpus.documents() if file_of(str(r.metadata.get("source"))) in files}
        report = corpus.ingest(
            [text for text, _ in chunks],
            metadatas=[metadata for _, metadata in chunks],
            documents=[re.sub(r"#page=\d+$", "", metadata["source"]) for _, metadata in chunks],
            instead_of=sorted(before),
            refill=not _is_full(home, engine),
            progress=progress,
        )
        # Then the chunks of other files may lack theirs, too.
        if report.completed and not corpus.stats().uncached and not _is_full(home, engine):
            corpus.reconcile(verify=False, progress=progress)
        if context is not None:
            corpus.renew_contexts(context, progress=progress)
    if before - set(report.ids):
        home.sweep()
    return report


def _nobodys(tenant: Tenant | None) -> Fingerprint:
    """That of no model, with what names of the tenant's chats are made of."""
    if tenant is None:
        return Fingerprint("", "", "", "", "")
    return Fingerprint("", "", "", "", "", tenant=tenant.label, tenant_key=tenant.key)


def _fitting(index: Index, context: Context | None) -> Context | None:
    """The context for a corpus: the collection's own, if it has one, is changed by `renew_contexts` only."""
    noted = None if index.context is None else Context.parse(index.context)
    if context is None:
        return BEFORE if noted is None and index.count() == 0 else None
    return context if noted in (None, ALONE, context) else None


def _is_full(home: Home, engine: Engine) -> bool:
    """Whether no cache of usual size fits: evicted ones would only evict others, were they built anew."""
    budget, stats = home.settings().budget_bytes, (engine.store or home.store()).stats()
    if budget is None or not stats.entries:
        return False
    return stats.num_bytes + stats.num_bytes / stats.entries > budget


def file_of(source: str) -> str:
    """The file of a source: without the page or line behind it."""
    return re.sub(r"#(page|line)=\d+$", "", source)


class Counter(Protocol):
    """What cutting needs to know of a model."""

    @property
    def max_tokens(self) -> int:
        """Longest text."""
        ...

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Tokens of a text."""
        ...


def chunks_of(text: str, encoder: Counter, chunk_tokens: int, *, by_paragraph: bool) -> list[str]:
    """The chunks that `ingest` makes of a text."""
    most = min(chunk_tokens, encoder.max_tokens // 2)  # a question and its answer need room, too
    return split(text, encoder.tokenize, most, by="paragraph" if by_paragraph else "size")

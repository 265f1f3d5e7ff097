"""langchain-chroma's vector store with caches that live and die with its documents."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from chromadb.api import ClientAPI
from langchain_core.embeddings import Embeddings
from tqdm import tqdm

from kvrag import ConfigError, Engine, MissingExtra
from kvrag.companion import Companion, CompanionReport
from kvrag.database import FolderDatabase, open_database
from kvrag.ingested import known_of
from langchain_kvrag._collection import Access, CachedCollection, ClientAccess, FolderAccess
from langchain_kvrag._hints import prefetch_of, serve
from langchain_kvrag._serving import Serving, document_form

try:
    from langchain_chroma import Chroma
except ImportError as error:
    raise MissingExtra("langchain-chroma", "langchain") from error


class KVChroma(Chroma):
    """A Chroma vector store whose documents are read by the model when they are added, and never again.

    Everything that langchain-chroma does goes on as before; in addition a document's cache is built before
    it is written, replaced when it is updated, and removed when no document has its text any more.

    >>> from langchain_kvrag import ChatKVCache, KVChroma  # doctest: +SKIP
    >>> model = ChatKVCache(store="caches")  # doctest: +SKIP
    >>> store = KVChroma("docs", embeddings, "chroma", engine=model)  # doctest: +SKIP

    Args:
        args: as of `langchain_chroma.Chroma`.
        engine: whose caches these are: a `ChatKVCache`, a `KVCacheLLM` or a `kvrag.Engine`.
        prefix: what documents are encoded behind; None: what the model says, else "template".
        remember: most documents of a collection that is opened, whose texts are looked for in prompts at
            once; others are when they are retrieved.
        named: as of `langchain_chroma.Chroma`.

    Raises:
        ConfigError: there is no engine.
        CorpusLocked: the collection has to be created while another process writes to the folder.
    """

    def __init__(
        self,
        *args: Any,
        engine: Serving | Engine | None = None,
        prefix: str | None = None,
        remember: int = 10_000,
        **named: Any,
    ) -> None:
        if engine is None:
            raise ConfigError(
                "KVChroma needs engine=...: the model, or the kvrag.Engine, to build caches for"
            )
        self._holder = engine
        self._engine = engine.running if isinstance(engine, Serving) else engine
        self._form = document_form(engine, prefix)
        self._companions: dict[str, Companion] = {}
        self._no_caches = threading.local()
        self._changing = threading.RLock()
        serve(self._engine, self._form)
        self._access: Access | None = None
        settings = _named(args, named)
        database = _database(settings)
        if database is None:
            super().__init__(**settings)
        else:
            self._open_folder(database, settings)
        self._remember(remember)

    def _open_folder(self, database: FolderDatabase, settings: dict[str, Any]) -> None:
        """Open our own way, so that processes which share the folder do not spoil it."""
        self._access = FolderAccess(database)
        for name in ("persist_directory", "client"):
            settings.pop(name, None)
        name = settings.get("collection_name", self._LANGCHAIN_DEFAULT_COLLECTION_NAME)
        try:
            with self._access.reading() as client:
                is_new = name not in {found.name for found in client.list_collections()}
            change = self._access.writing() if is_new else self._access.reading()
            with change as client:
                super().__init__(client=client, **settings)
        except BaseException:
            database.close()
            raise

    # langchain-chroma sets and reads these two; ours stay right when the folder is opened anew.

    @property
    def _client(self) -> ClientAPI:
        assert self._access is not None
        with self._access.reading() as client:
            return client

    @_client.setter
    def _client(self, client: ClientAPI) -> None:
        if self._access is None:
            self._access = ClientAccess(client)

    @property
    def _collection(self) -> Any:
        whole = super()._collection  # says so if there is none
        if getattr(self._no_caches, "now", False):
            return whole
        return self._cached

    @property
    def _cached(self) -> CachedCollection:
        assert self._access is not None
        return CachedCollection(
            self._access,
            self._collection_name,
            known_of(self._engine),
            self._companion,
            lock=self._changing,
            retrieved=self._expect,
        )

    def _companion(self, owner: str) -> Companion | None:
        store = self._engine.store
        if store is None:
            return None
        if owner not in self._companions:
            encoder = self._engine.encoder(self._form)
            self._companions[owner] = Companion(owner, store, encoder)
        return self._companions[owner]

    def _expect(self, texts: Sequence[str]) -> None:
        known_of(self._engine).see(texts)
        prefetch_of(self._engine).hint(texts, self._form)

    def _remember(self, most: int) -> None:
        if 0 < self._cached.count() <= most:
            known_of(self._engine).add(text for _, text in self._cached.records())

    def reconcile(self, *, progress: bool = False) -> CompanionReport:
        """Make the caches what the collection says, after it was written past this object, or after a crash.

        What is there already is not built again, so that an interrupted call can be repeated.

        Args:
            progress: show a bar.

        Raises:
            ConfigError: the engine keeps no caches.
        """
        cached = self._cached
        companion = self._companion(str(cached.id))
        if companion is None:
            raise ConfigError("the engine has no store to keep caches in; make it with store=...")
        total = cached.count()
        known = known_of(self._engine)
        with tqdm(total=total, desc="reading documents", unit="doc", disable=not progress) as bar:

            def told() -> Iterator[tuple[str, str]]:
                for record in cached.records():
                    known.see([record[1]])
                    yield record

            return companion.reconcile(told(), total=total, progress=lambda done, _: _to(bar, done))

    def add_images(self, *args: Any, **named: Any) -> list[str]:
        """As in langchain-chroma; pictures are no documents to read, and get no caches."""
        with self._without_caches():
            return super().add_images(*args, **named)

    @contextmanager
    def _without_caches(self) -> Iterator[None]:
        self._no_caches.now = True
        try:
            yield
        finally:
            self._no_caches.now = False

    def delete_collection(self) -> None:
        """Delete the collection, and the caches that no other collection needs."""
        cached = self._cached
        companion, texts = self._companion(str(cached.id)), [text for _, text in cached.records()]
        assert self._access is not None
        with self._access.writing():
            super().delete_collection()
        if companion is not None:
            companion.drop_all()
        known_of(self._engine).remove(texts)

    def reset_collection(self) -> None:
        """Delete the collection and make an empty one."""
        assert self._access is not None
        with self._access.writing():
            super().reset_collection()

    def close(self) -> None:
        """Let go of the folder and of the references; the engine stays open."""
        for companion in self._companions.values():
            companion.close()
        if self._access is not None:
            self._access.close()

    def __enter__(self) -> Self:
        """Close on exit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def attach(
    existing: Chroma,
    engine: Serving | Engine,
    *,
    progress: bool = True,
    prefix: str | None = None,
) -> KVChroma:
    """A vector store that is full already gets its caches.

    Can be interrupted and repeated: what was built is not built again. Write to the returned object from
    then on; what is written to the old one is noticed by `KVChroma.reconcile`.

    Args:
        existing: of langchain-chroma, with any client.
        engine: as of `KVChroma`.
        progress: show a bar.
        prefix: as of `KVChroma`.

    Raises:
        ConfigError: the engine keeps no caches.
    """
    embeddings: Embeddings | None = existing.embeddings
    made = KVChroma(
        collection_name=existing._collection_name,
        embedding_function=embeddings,
        client=existing._client,
        relevance_score_fn=existing.override_relevance_score_fn,
        engine=engine,
        prefix=prefix,
        remember=0,
    )
    made.reconcile(progress=progress)
    return made


_POSITIONS = ("collection_name", "embedding_function", "persist_directory")


def _named(args: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name.

    Raises:
        ConfigError: more by place than anybody can tell apart.
    """
    if len(args) > len(_POSITIONS):
        raise ConfigError(f"give all arguments behind {_POSITIONS[-1]} by name")
    return {**dict(zip(_POSITIONS, args, strict=False)), **named}


def _database(settings: dict[str, Any]) -> FolderDatabase | None:
    """The folder, where it is ours to open."""
    others = ("client", "client_settings", "tenant", "database", "host", "chroma_cloud_api_key")
    if settings.get("persist_directory") is None or any(settings.get(name) is not None for name in others):
        return None
    database = open_database(settings["persist_directory"])
    assert isinstance(database, FolderDatabase)
    return database


def _to(bar: Any, done: int) -> None:
    bar.update(done - bar.n)

"""Opening a Chroma collection: its graph's settings, and whose embedding it has."""

from __future__ import annotations

from typing import Any, cast

import chromadb
from chromadb.api.client import Client
from chromadb.api.types import Documents, EmbeddingFunction
from chromadb.errors import ChromaError, NotFoundError
from chromadb.utils.embedding_functions import known_embedding_functions

from kvrag.database import FolderDatabase, ServerDatabase
from kvrag.embedding import HashedEmbedding
from kvrag.errors import ConfigError

Embedding = EmbeddingFunction[Documents]
Database = FolderDatabase | ServerDatabase
# With Chroma's defaults (100, 100, 16) the graph loses records among near-duplicates: of 1,300 that differ
# in one word, 21 in 100 were not found by their own text; with these 9. Of more varied ones it is 1 in 100.
_GRAPH = {"ef_construction": 200, "ef_search": 200, "max_neighbors": 32}


def open_collection(
    database: Database, client: Client, name: str, embedding: Embedding | None
) -> chromadb.Collection:
    """A collection with its embedding; created if there is none.

    Raises:
        ConfigError: the embedding is another one than the collection's, or the name is not allowed.
        CorpusLocked: it has to be created while another process is writing.
    """
    try:
        try:
            found = client.get_collection(name, embedding_function=None)
        except NotFoundError:
            client = _create(database, name, embedding)
            found = client.get_collection(name, embedding_function=None)
        agreed = _agreed_embedding(found, embedding)
        return client.get_collection(name, embedding_function=cast(Any, agreed))
    except ConfigError:
        raise
    except (ChromaError, ValueError) as error:
        raise ConfigError(f"cannot open the collection {name!r}: {error}") from error


def space_of(collection: chromadb.Collection) -> str:
    """What the collection's graph measures distances by."""
    noted = collection.configuration_json
    graph = noted.get("hnsw") or noted.get("spann") or {}
    return str(graph.get("space") or "l2")


def _create(database: Database, name: str, embedding: Embedding | None) -> Client:
    database.begin_writing()
    try:
        with database.writing() as client:
            chosen = embedding or HashedEmbedding()
            # Named, because Chroma does not ask the embedding once it is told anything of the graph.
            graph = {"space": chosen.default_space(), **_GRAPH}
            client.get_or_create_collection(
                name, embedding_function=cast(Any, chosen), configuration=cast(Any, {"hnsw": graph})
            )
            return client
    finally:
        database.end_writing()


def _agreed_embedding(collection: chromadb.Collection, given: Embedding | None) -> Embedding:
    """The given embedding, or the collection's own; Chroma itself would not compare their settings.

    Raises:
        ConfigError: they differ, or there is none.
    """
    noted = collection.configuration_json.get("embedding_function") or {}
    name, config = noted.get("name"), noted.get("config") or {}
    if given is None:
        if name not in known_embedding_functions:
            raise ConfigError(
                f"the collection {collection.name!r} was made with the embedding {name!r}, which is unknown "
                "here: give the same one as embedding=..., or import the module that registers it"
            )
        return cast(Embedding, known_embedding_functions[name].build_from_config(config))
    if name is None:
        return given  # made by a version, or with a function, that notes nothing: nothing to compare
    if given.name() != name:
        raise ConfigError(
            f"the collection {collection.name!r} was made with the embedding {name!r}, not {given.name()!r}: "
            "give that one, or choose another collection"
        )
    try:
        given.validate_config_update(config, given.get_config())
    except ValueError as error:
        raise ConfigError(
            f"the collection {collection.name!r} has this embedding set up otherwise: {error}"
        ) from error
    return given

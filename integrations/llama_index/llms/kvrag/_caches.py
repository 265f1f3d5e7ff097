"""The caches of one index: built for its nodes, gone with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode

from kvrag import ConfigError, Engine
from kvrag.companion import Companion, CompanionReport
from kvrag.ingested import key_of, known_of
from kvrag.prompt import RagPrompt
from kvrag.store.references import References
from llama_index.llms.kvrag._hints import pasted

OWNER = "llama_index"
_BETWEEN = "\x1f"


class NodeCaches:
    """Entries for the texts of nodes, by document.

    Node ids change with every run of a pipeline and say nothing; what is noted is the document's id and a
    digest of the text as it will be pasted. May be used from any thread.
    """

    def __init__(self, engine: Engine, form: RagPrompt, owner: str) -> None:
        """Keep the caches of an index.

        Args:
            engine: whose caches.
            form: of the prompts that the nodes will stand in.
            owner: name of the index; each that shares a store has its own.

        Raises:
            ConfigError: the engine keeps no caches.
        """
        store = engine.store
        if store is None:
            raise ConfigError("the engine has no store to keep caches in; make it with store=...")
        path: Any = getattr(store, "path", None)
        self._references = References(None if path is None else Path(path) / "references.sqlite")
        encoder = engine.encoder(form)
        self._companion = Companion(owner, store, encoder, references=self._references)
        self._known, self._owner = known_of(engine), owner

    def build(self, nodes: Sequence[BaseNode]) -> list[str]:
        """Build what is missing; the entries that nobody refers to any more, for `collect`."""
        texts = {_record(node): pasted(node) for node in nodes}
        freed = self._companion.hold(texts)
        self._known.see(texts.values())
        return freed

    def replace(self, nodes: Sequence[BaseNode]) -> None:
        """Build what is missing, and drop what these nodes' documents had besides."""
        new = {_record(node) for node in nodes}
        documents = {_document(record) for record in new}
        before = [record for record in self._references.of(self._owner) if _document(record) in documents]
        freed = self.build(nodes)
        self._companion.drop(record for record in before if record not in new)
        self.collect(freed)

    def collect(self, freed: Sequence[str]) -> None:
        """Remove entries that nobody refers to."""
        self._companion.collect(freed)

    def drop_documents(self, ids: Iterable[str]) -> None:
        """Documents are gone."""
        gone = set(ids)
        self._companion.drop(r for r in self._references.of(self._owner) if _document(r) in gone)

    def drop_nodes(self, nodes: Sequence[BaseNode]) -> None:
        """Nodes are gone."""
        self._companion.drop({_record(node) for node in nodes})
        self._known.remove(pasted(node) for node in nodes)

    def documents(self) -> set[str]:
        """Ids of the documents that have caches."""
        return {_document(record) for record in self._references.of(self._owner)}

    def reconcile(self, nodes: Sequence[BaseNode]) -> CompanionReport:
        """Make the caches what an index says; what is there already is not built again."""
        texts = {_record(node): pasted(node) for node in nodes}
        self._known.see(texts.values())
        return self._companion.reconcile(texts.items(), total=len(texts))

    def close(self) -> None:
        """Close the file of references."""
        self._companion.close()


def _record(node: BaseNode) -> str:
    return f"{node.ref_doc_id or node.node_id}{_BETWEEN}{key_of(pasted(node))}"


def _document(record: str) -> str:
    return record.rpartition(_BETWEEN)[0]

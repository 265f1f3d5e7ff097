"""What has just been retrieved, told to the engines while the prompt is still being written.

LlamaIndex's retrievers tell the instrumentation's root dispatcher what they return. Our handler makes these
texts known to all engines and starts to load their caches. It decides nothing: what is found in the prompt
is found by its text, whether or not the event reached us.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index_instrumentation import get_dispatcher

from kvrag import Engine
from kvrag.ingested import engines, key_of, known_of
from kvrag.prefetch import Prefetch
from kvrag.prompt import RagPrompt

FIELD = "kvrag"
"""The metadata field in which a node carries what an answer made of it."""

RETRIEVED: ContextVar[Sequence[NodeWithScore]] = ContextVar("kvrag_retrieved", default=())
"""The nodes that the next answers of this context are about, as the post-processor handed them out."""

_forms: WeakKeyDictionary[Engine, RagPrompt] = WeakKeyDictionary()
_prefetches: WeakKeyDictionary[Engine, Prefetch] = WeakKeyDictionary()
_attaching = threading.Lock()


class Watch(BaseEventHandler):
    """Hears what retrievers return."""

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's listings."""
        return "KVCacheWatch"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        """Note texts that are on their way into a prompt."""
        if isinstance(event, RetrievalEndEvent):
            texts = [pasted(found.node) for found in event.nodes]
            for engine in engines():
                expect(engine, texts)


def serve(engine: Engine, form: RagPrompt) -> None:
    """From now on, what retrievers return is made known to this engine and loaded in this form."""
    known_of(engine)
    with _attaching:
        _forms[engine] = form
        root = get_dispatcher()
        if not any(isinstance(handler, Watch) for handler in root.event_handlers):
            root.add_event_handler(Watch())


def expect(engine: Engine, texts: Sequence[str]) -> None:
    """Texts will probably stand in a prompt for this engine soon."""
    known_of(engine).see(texts)
    form = _forms.get(engine)
    if form is not None:
        prefetch_of(engine).hint(texts, form)


def prefetch_of(engine: Engine) -> Prefetch:
    """The engine's loader."""
    with _attaching:
        return _prefetches.setdefault(engine, Prefetch(engine))


def pasted(node: BaseNode) -> str:
    """A node's text as synthesizers paste it into a prompt, with its header of metadata."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def write_back(nodes: Sequence[NodeWithScore], uses: Sequence[dict[str, Any]]) -> None:
    """Add to nodes what an answer made of them.

    Args:
        nodes: as the post-processor handed them out; copies of its own.
        uses: as `llama_index.llms.kvrag._results.raw_of` gives them.
    """
    by_key = {use["key"]: use for use in uses}
    for found in nodes:
        use = by_key.get(key_of(pasted(found.node)))
        if use is not None:
            found.node.metadata[FIELD] = {name: value for name, value in use.items() if name != "key"}

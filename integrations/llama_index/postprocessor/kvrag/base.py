"""Retrieved nodes: which fit and in which order, and afterwards what the answer made of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core.base.response.schema import (
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from kvrag import ConfigError
from kvrag.budget import Budget
from llama_index.llms.kvrag import KVCacheLLM
from llama_index.llms.kvrag._hints import FIELD, RETRIEVED, expect, pasted

AnyResponse = Response | StreamingResponse | AsyncStreamingResponse | PydanticResponse


class KVCachePostprocessor(BaseNodePostprocessor):
    """Takes retrieved nodes on their way to the model; the last one in `node_postprocessors`.

    It makes the texts known that the synthesizer will paste, starts to load their caches, leaves out the
    nodes that fit neither into a cache nor into the budget, and returns copies. Once the model has answered
    in the same context (task, or thread), these copies, which are the response's `source_nodes`, say under
    "kvrag" in their metadata what share of the attention each got; `answer_scores` reads it.
    """

    llm: KVCacheLLM = Field(description="The model that will answer.", exclude=True)
    max_tokens: int | None = Field(
        default=None,
        description="Of all nodes together; None: what the model's window leaves, see kvrag.budget.Budget.",
    )
    order: Literal["keep", "best_last", "source"] = Field(
        default="keep",
        description="Of the nodes: as retrieved, the best next to the question, or as in their documents.",
    )

    _budget: Budget = PrivateAttr()

    def __init__(self, llm: KVCacheLLM, **fields: Any) -> None:
        """Serve one model.

        Raises:
            ConfigError: not our model, an impossible order, or nothing is left for nodes.
        """
        if not isinstance(llm, KVCacheLLM):
            raise ConfigError(f"llm is a {type(llm).__name__}; expected the KVCacheLLM that will answer")
        if fields.get("order", "keep") not in {"keep", "best_last", "source"}:
            raise ConfigError(f"order is {fields['order']!r}; expected keep, best_last or source")
        super().__init__(**{"llm": llm, **fields})
        self._budget = Budget(llm.running, llm.form, max_tokens=self.max_tokens, answer_tokens=llm.max_tokens)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's listings."""
        return "KVCachePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._hand_out(self._chosen(nodes))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        # Only the counting goes to a thread: a context variable that is set there would be lost.
        return self._hand_out(await asyncio.to_thread(self._chosen, nodes))

    def _chosen(self, nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        """Copies of the nodes that fit, in order."""
        is_scored = all(found.score is not None for found in nodes)
        ranked = sorted(nodes, key=lambda found: -(found.score or 0.0)) if is_scored else nodes
        lengths = [self._budget.length(pasted(found.node)) for found in ranked]
        kept = {id(ranked[number]): lengths[number] for number in self._budget.fitting(lengths)}
        retrieved = ranked[::-1] if self.order == "best_last" else nodes
        ordered = [found for found in retrieved if id(found) in kept]
        if self.order == "source":
            ordered = _by_source(ordered)
        return [_marked(found, kept[id(found)]) for found in ordered]

    def _hand_out(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        expect(self.llm.running, [pasted(found.node) for found in nodes])
        RETRIEVED.set(tuple(nodes))
        return nodes


def answer_scores(response: AnyResponse | Sequence[NodeWithScore]) -> dict[str, dict[str, Any]]:
    """What an answer made of its nodes, by node id; of a streamed one, once it was read to its end.

    `mass` and `focus` are shares of the attention while the answer's tokens were chosen (`focus` says better
    what the answer rests on), `question_mass` while the question was read; `is_hit`: the cache was there;
    `dropped_at`: the layer from which on a policy left it out.

    Args:
        response: of a query or chat engine, or its source nodes. Nodes that no answer has read, or that were
            not found in its prompt, have nothing but their length.
    """
    nodes = response if isinstance(response, Sequence) else response.source_nodes
    return {found.node.node_id: dict(found.node.metadata.get(FIELD) or {}) for found in nodes}


def _marked(found: NodeWithScore, num_tokens: int) -> NodeWithScore:
    """A copy that carries our field: the original may be the retriever's own, and serve others at once."""
    node = found.node
    hidden = {
        name: [*getattr(node, name), *([] if FIELD in getattr(node, name) else [FIELD])]
        for name in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
    }
    field = {FIELD: {"num_tokens": num_tokens}}
    copy = node.model_copy(update={**hidden, "metadata": {**node.metadata, **field}})
    return NodeWithScore(node=copy, score=found.score)


def _by_source(nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
    """Nodes of one document together, where the first of them stood, in the document's order."""
    first: dict[str, int] = {}
    for number, found in enumerate(nodes):
        first.setdefault(found.node.ref_doc_id or found.node.node_id, number)

    def place(found: NodeWithScore) -> tuple[int, int]:
        document = found.node.ref_doc_id or found.node.node_id
        return first[document], getattr(found.node, "start_char_idx", None) or 0

    return sorted(nodes, key=place)

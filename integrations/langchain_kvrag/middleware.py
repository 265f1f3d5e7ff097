"""For agents: what tools retrieve is loaded early, cut to the budget, and told what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from kvrag import MissingExtra
from langchain_kvrag.documents import KVCacheCompressor, relevance

try:
    from langchain.agents.middleware import AgentMiddleware, ToolCallRequest
except ImportError as error:
    raise MissingExtra("langchain", "langchain-agents") from error

LEFT_OUT = "(left out: it does not fit into the model's window)"


class KVCacheMiddleware(AgentMiddleware[Any, Any, Any]):
    """Lets an agent's retrieval tools work hand in hand with the model's caches.

    When a tool returns documents (as its artifact), loading their caches starts, and documents that do not
    fit are left out of its text and its artifact. After the model's next answer the artifacts' documents say
    in their metadata, under "kvrag", what share of the attention they got. Only plain values get into the
    agent's state.

    Args:
        compressor: decides what fits.
    """

    def __init__(self, compressor: KVCacheCompressor) -> None:
        """Work for the compressor's model."""
        super().__init__()
        self.compressor = compressor

    def wrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Any]) -> Any:
        """Take what a tool returned."""
        made = handler(request)
        documents = documents_of(made)
        return (
            _fitted(made, documents, self.compressor.compress_documents(documents, "")) if documents else made
        )

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Any]]
    ) -> Any:
        """The same without blocking."""
        made = await handler(request)
        documents = documents_of(made)
        if not documents:
            return made
        return _fitted(made, documents, await self.compressor.acompress_documents(documents, ""))

    def after_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Say of documents what the answer made of them."""
        messages: list[BaseMessage] = state["messages"]
        answer = messages[-1] if messages else None
        if not isinstance(answer, AIMessage) or not answer.response_metadata.get("kvrag", {}).get(
            "documents"
        ):
            return None
        told = [
            message.model_copy(update={"artifact": relevance(answer, documents)})
            for message in messages
            if isinstance(message, ToolMessage) and (documents := documents_of(message))
        ]
        return {"messages": told} if told else None  # of the same ids: they replace the old ones

    async def aafter_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """The same; nothing in it waits."""
        return self.after_model(state, runtime)


def documents_of(made: Any) -> list[Document]:
    """Documents that a tool's message carries, if it carries nothing else."""
    artifact = made.artifact if isinstance(made, ToolMessage) else None
    if not isinstance(artifact, (list, tuple)) or not all(isinstance(item, Document) for item in artifact):
        return []
    return list(artifact)


def _fitted(made: ToolMessage, before: list[Document], after: Any) -> ToolMessage:
    """The message with the documents that are left."""
    left = {document.page_content for document in after}
    content = made.content
    for document in before:
        if isinstance(content, str) and document.page_content and document.page_content not in left:
            content = content.replace(document.page_content, LEFT_OUT)
    return made.model_copy(update={"content": content, "artifact": list(after)})

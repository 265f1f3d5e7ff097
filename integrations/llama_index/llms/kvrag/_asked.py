"""An answer under way: what can be shown of it, and what its nodes get to know."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from llama_index.core.schema import NodeWithScore

from kvrag import Answer, AnswerStream, GenerationCancelled, Session
from kvrag.calling import CallWatch
from kvrag.explain import why_not
from kvrag.ingested import key_of
from llama_index.llms.kvrag._hints import pasted, write_back
from llama_index.llms.kvrag._results import raw_of
from llama_index.llms.kvrag._tools import Form

logger = logging.getLogger("llama_index.llms.kvrag")


@dataclass(frozen=True)
class Asked:
    """An answer under way, the nodes that it is about, and the session that it is a turn of."""

    stream: AnswerStream
    nodes: Sequence[NodeWithScore]
    model: str
    form: Form
    session: Session | None = None

    def pieces(self) -> Iterator[str]:
        """Text that can be shown; leaving the loop stops the answer."""
        watch = CallWatch(self.form.tools)
        with self.stream as stream:
            for piece in stream:
                yield watch.push(piece)
        yield watch.finish()[0]

    async def apieces(self) -> AsyncGenerator[str, None]:
        """The same without blocking the event loop."""
        watch = CallWatch(self.form.tools)
        with self.stream as stream:
            async for piece in stream:
                yield watch.push(piece)
        yield watch.finish()[0]

    def finish(self) -> Answer:
        """The whole answer; what it made of the nodes is written into them.

        Raises:
            GenerationCancelled: it was stopped.
        """
        answer = self.stream.answer
        if answer is None:
            raise GenerationCancelled("the answer was cancelled")
        write_back(self.nodes, raw_of(answer, self.model)["kvrag"]["documents"])
        self._explain(answer)
        return answer

    def _explain(self, answer: Answer) -> None:
        """One line about retrieved nodes that are not among the answer's cached ones."""
        if not (self.nodes and logger.isEnabledFor(logging.DEBUG)):
            return
        found = {use.key for use in answer.documents}
        missed = [text for node in self.nodes if key_of(text := pasted(node.node)) not in found]
        if missed:
            reasons = (f"{text[:32]!r}: {why_not(answer.plan, text, min_chars=16)}" for text in missed)
            logger.debug("%d retrieved nodes were not used from caches: %s", len(missed), "; ".join(reasons))

    def grown(self) -> Iterator[tuple[str, str]]:
        """The text so far and its last piece."""
        text = ""
        for piece in self.pieces():
            if piece:
                text += piece
                yield text, piece

    async def agrown(self) -> AsyncGenerator[tuple[str, str], None]:
        """The same without blocking the event loop."""
        text = ""
        async with aclosing(self.apieces()) as pieces:
            async for piece in pieces:
                if piece:
                    text += piece
                    yield text, piece

"""The whole question: retrieve, put the documents into the model's prompt, answer from their caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvrag.answer import Answer, DocumentUse
from kvrag.config import Sampling
from kvrag.corpus import Corpus
from kvrag.engine import AnswerStream, Engine
from kvrag.errors import GenerationCancelled, InputError
from kvrag.index import Hit
from kvrag.prompt import RagPrompt


@dataclass(frozen=True, slots=True)
class Source:
    """A retrieved chunk and what the answer made of it.

    Attributes:
        id: of the chunk.
        name: where it comes from.
        text: the chunk.
        num_tokens: its length.
        is_hit: its rows came from the store.
        mass: its share of the attention, while the answer's tokens were chosen, mean over layers and heads.
        focus: its share among the documents of squared attention; what the answer rests on.
    """

    id: str
    name: str
    text: str
    num_tokens: int
    is_hit: bool
    mass: float
    focus: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and the documents that it rests on, most looked at first."""

    question: str
    text: str
    sources: tuple[Source, ...]
    answer: Answer

    def as_dict(self) -> dict[str, Any]:
        """The reply for JSON."""
        return {
            "question": self.question,
            "answer": self.text,
            "finish_reason": self.answer.finish_reason,
            "sources": [asdict(source) for source in self.sources],
            "usage": asdict(self.answer.usage),
            "seconds": asdict(self.answer.timing),
        }


class Asked:
    """A question under way: iterate it for the text, then take the `reply`."""

    def __init__(self, question: str, hits: Sequence[Hit], stream: AnswerStream) -> None:
        """Wrap the stream of one question."""
        self.question = question
        self._hits = {hit.id: hit for hit in hits}
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; blanks at the beginning are left out."""
        started = False
        for piece in self._stream:
            shown = piece if started else piece.lstrip()
            if shown:
                started = True
                yield shown

    def cancel(self) -> None:
        """Stop after the current token."""
        self._stream.cancel()

    def reply(self) -> Reply:
        """The finished reply; reads the rest of the text if there is some.

        Raises:
            GenerationCancelled: the answer was stopped.
        """
        for _ in self._stream:
            pass
        answer = self._stream.answer
        if answer is None:
            raise GenerationCancelled("the answer was cancelled")
        left = list(self._hits.values())
        sources = [_source(use, self._hits[use.key], left) for use in answer.documents]
        sources.sort(key=lambda s: s.focus, reverse=True)
        return Reply(self.question, answer.text.strip(), tuple(sources), answer)


def ask(
    engine: Engine,
    corpus: Corpus,
    question: str,
    *,
    k: int = 4,
    form: RagPrompt | None = None,
    sampling: Sampling | None = None,
) -> Asked:
    """Answer a question from a corpus.

    Args:
        engine: the model and its caches.
        corpus: where to look.
        question: what to ask; also what is searched for.
        k: how many chunks to retrieve.
        form: how documents and question stand in the prompt; default: in the words of the model's template.
        sampling: how the answer is chosen; greedy by default.

    Raises:
        InputError: the question is blank.
    """
    if not question.strip():
        raise InputError("the question is empty")
    hits = corpus.search(question, k)
    form = form or RagPrompt.of(engine.model.text)
    stream = engine.stream_rendered(
        form.render([hit.text for hit in hits], question),
        {hit.id: hit.text for hit in hits},
        prefix=form.prefix,
        sampling=sampling,
        is_rendered=form.is_rendered,
    )
    return Asked(question, hits, stream)


def _source(use: DocumentUse, found: Hit, left: list[Hit]) -> Source:
    """The chunk of a span; where several chunks have its text, each in turn, in the prompt's order."""
    hit = next((h for h in left if h.text == found.text), found)
    if hit in left:
        left.remove(hit)
    name = str(hit.metadata.get("source") or hit.id)
    return Source(hit.id, name, hit.text, use.num_tokens, use.is_hit, use.mass, use.focus)

"""The whole question: retrieve, put the documents into the model's prompt, answer from their caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kvrag.answer import Answer, DocumentUse
from kvrag.chroma_rows import Hit
from kvrag.citations import Span
from kvrag.config import Sampling
from kvrag.corpus import Corpus
from kvrag.engine import Engine
from kvrag.errors import ConfigError, GenerationCancelled, InputError
from kvrag.focus.policy import Policy, preset
from kvrag.focus.pruning import AttentionScore, Pruning
from kvrag.focus.repair import Deviation, FirstRows, QueryDriven
from kvrag.prompt import RagPrompt
from kvrag.streams import AnswerStream


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
        question_mass: as `mass`, while the question was read.
        dropped_at: first layer that did not read it for the question any more; None: all did.
        is_read: the answer's tokens read it.
        span: the place in it that was looked at most, for the best chunks of a policy with `spans`.
    """

    id: str
    name: str
    text: str
    num_tokens: int
    is_hit: bool
    mass: float
    focus: float
    question_mass: float = 0.0
    dropped_at: int | None = None
    is_read: bool = True
    span: Span | None = None


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
            "policy": self.answer.policy,
            "risk": self._risk(),
            "in_full": self.answer.in_full,
            "trace": self.answer.trace.as_dict(),
            "usage": asdict(self.answer.usage),
            "seconds": asdict(self.answer.timing),
        }

    def _risk(self) -> dict[str, float] | None:
        """The signals, and the one that a limit is compared with."""
        risk = self.answer.risk
        return None if risk is None else {"value": risk.value, **asdict(risk)}


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
    policy: Policy | None = None,
) -> Asked:
    """Answer a question from a corpus.

    Args:
        engine: the model and its caches.
        corpus: where to look.
        question: what to ask; also what is searched for.
        k: how many chunks to retrieve.
        form: how documents and question stand in the prompt; default: in the words of the model's template.
        sampling: how the answer is chosen; greedy by default.
        policy: what is done with the documents; None: the engine's. What they are encoded behind is the
            corpus's `context`, so that every document comes from the store.

    Raises:
        InputError: the question is blank.
    """
    if not question.strip():
        raise InputError("the question is empty")
    hits = corpus.search(question, k)
    form = form or RagPrompt.of(engine.model.text)
    policy = _nearer(policy or engine.policy, hits)
    contexts = corpus.contexts([hit.id for hit in hits])
    before = {name: form.before(texts) for name, texts in contexts.items()}
    chunks = {hit.id: hit.text for hit in hits}
    ahead = engine.prefetch(
        chunks, prefix=form.prefix, contexts=before, policy=policy, is_rendered=form.is_rendered
    )
    stream = engine.stream_rendered(
        form.render([hit.text for hit in hits], question),
        chunks,
        prefix=form.prefix,
        sampling=sampling,
        policy=policy,
        contexts=before,
        sources={hit.id: str(source) for hit in hits if (source := hit.metadata.get("source"))},
        is_rendered=form.is_rendered,
        ahead=ahead,
    )
    return Asked(question, hits, stream)


def policy_of(
    name: str,
    *,
    keep: int | float | None = None,
    layers: tuple[int, ...] | None = None,
    rows: Literal["question", "last"] = "question",
    nearness: float | None = None,
    repair: float | None = None,
    max_risk: float | None = None,
    spans: bool = False,
) -> Policy:
    """A policy by name, with pruning, repair, spans or a limit added to it or set otherwise.

    Args:
        name: of a preset.
        keep: documents left by pruning, a number or a share.
        layers: prune by the attention of these layers, right behind the last of them (`kvrag doctor` says
            which find the right documents), and choose rows to read again by it; None: as the policy says.
        rows: whose attention that is, see `AttentionScore`.
        nearness: how much the search's similarity counts beside attention, see `Pruning`; 4 is a good choice.
        repair: share of the documents' rows read again; those the question looks at most, unless the policy
            has its own way to choose a share.
        max_risk: read the documents in full if the answer's risk is above.
        spans: find the strongest place in the best documents.

    Raises:
        ConfigError: no policy has this name, or a value has no meaning for it.
    """
    policy = preset(name)
    name, pruning, mended = policy.name, policy.pruning, policy.repair
    if keep is not None:
        name += "" if pruning else "+pruning"
        pruning = replace(pruning or Pruning(), keep=keep)
    if repair is not None:
        if isinstance(mended, FirstRows):
            raise ConfigError(f"policy {name!r} reads the first rows of documents again, not a share of them")
        name += "" if mended else "+query-driven"
        mended = replace(mended, share=repair) if isinstance(mended, Deviation) else QueryDriven(repair)
    if layers is not None or rows != "question":
        if pruning is None and not isinstance(mended, QueryDriven):
            raise ConfigError(f"policy {name!r} does not prune; set keep, or take cachefocus")
        if pruning is not None:
            start = max(layers) + 1 if layers else pruning.start
            pruning = replace(pruning, start=start, scorer=AttentionScore(layers, rows=rows))
        if isinstance(mended, QueryDriven):
            mended = replace(mended, layers=layers, looked_by=rows)
    if nearness is not None:
        if pruning is None:
            raise ConfigError(f"policy {name!r} does not prune; set keep, or take cachefocus")
        pruning = replace(pruning, nearness=nearness)
    if max_risk is not None and not 0 <= max_risk <= 1:
        raise ConfigError(f"max_risk={max_risk}: expected 0 to 1")
    return replace(policy, name=name, pruning=pruning, repair=mended, max_risk=max_risk, spans=spans)


def _nearer(policy: Policy, hits: Sequence[Hit]) -> Policy:
    """The policy, knowing what the search thought of each document."""
    if policy.pruning is None or not policy.pruning.nearness:
        return policy
    return replace(policy, pruning=policy.pruning.nearer([hit.similarity for hit in hits]))


def _source(use: DocumentUse, found: Hit, left: list[Hit]) -> Source:
    """The chunk of a span; where several chunks have its text, each in turn, in the prompt's order."""
    hit = next((h for h in left if h.text == found.text), found)
    if hit in left:
        left.remove(hit)
    name = str(hit.metadata.get("source") or hit.id)
    return Source(
        hit.id,
        name,
        hit.text,
        use.num_tokens,
        use.is_hit,
        use.mass,
        use.focus,
        use.question_mass,
        use.dropped_at,
        use.is_read,
        use.span,
    )

"""The recipe of an answer: plan, load, compose, read, decode; runs on the thread that owns the model."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Protocol

from kvrag.answer import Answer, DocumentUse, Piece, Usage
from kvrag.attention import Looking
from kvrag.caches import Caches, Loaded
from kvrag.choosing import Tokens
from kvrag.citations import Attention, Span
from kvrag.compose import compose
from kvrag.config import Sampling
from kvrag.decode import Behind, Chooser, Step, choice, end_tokens
from kvrag.errors import CacheMiss, ContextOverflow, InputError
from kvrag.focus.policy import PLAIN, Policy, SecondLook
from kvrag.focus.pruning import Pruning
from kvrag.focus.together import groups_of, scores_of
from kvrag.found import hits_by_tier, rows_of, without_lost_pieces
from kvrag.known import KnownTexts
from kvrag.laps import Laps
from kvrag.looking import Look, looking
from kvrag.model import Model
from kvrag.plan import Cached, PromptPlan, plan
from kvrag.prefill import STRIDE, Read, Work
from kvrag.store.key import EntryKey
from kvrag.text import joined_tokens
from kvrag.tiers import Finder
from kvrag.worker import Ask
from kvrag.written import Written

_WITH_SPANS = 3


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked.

    Attributes:
        prompt: the text as the model is to see it.
        chunks: texts that may stand in the prompt, by name.
        prefix: text that the chunks are encoded behind.
        is_rendered: the prompt came out of a chat template, which wrote any BOS itself.
        sampling: how the answer is chosen.
        policy: what is done with the documents.
        contexts: for chunks by name, pieces of text that they are encoded behind beside the prefix, each
            tokenised on its own.
        sources: for chunks by name, what they are chunks of; for a policy that keeps chunks `together`.
        ahead: what is read ahead for it; closed when the answer is complete or cancelled.
    """

    prompt: str
    chunks: Mapping[str, str] | Finder
    prefix: str
    is_rendered: bool
    sampling: Sampling
    policy: Policy = PLAIN
    contexts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    ahead: Closes | None = None


class Closes(Protocol):
    """What ends with the answer."""

    def close(self) -> None:
        """End it."""
        ...


def answer(
    caches: Caches, request: Request, *, stride: int = STRIDE
) -> Generator[Piece | Answer | Ask, Read, None]:
    """The answer, counted; what was read ahead for it ends with it. See `_answer`."""
    outcome = "cancelled"
    try:
        yield from _answer(caches, request, stride)
        outcome = "answers"
    finally:
        caches.metrics.add(outcome)
        if request.ahead is not None:
            request.ahead.close()


def _answer(caches: Caches, request: Request, stride: int) -> Generator[Piece | Answer | Ask, Read, None]:
    """Pieces of text as they become certain, then the finished answer; in between, what is to be read.

    Args:
        caches: of the model.
        request: what is asked.
        stride: most fresh tokens of a pass, see `kvrag.looking.looking`.

    Raises:
        InputError: the prompt is empty, or the tokenizer makes nothing of it.
        ContextOverflow: the prompt leaves no room for an answer.
    """
    clock = Laps()
    model, policy = caches.model, request.policy
    planned = without_lost_pieces(caches, _plan(model, request), partial(_key, caches, request))
    _check(model, planned, policy)
    clock.lap("plan")
    loaded, looked = yield from _look(caches, request, planned, clock, stride)
    sampling = _within(model, looked, request)
    chosen = choice(model, planned.tokens, sampling)
    asked = Looking(policy.group, frozenset(range(model.num_layers)) if policy.spans else frozenset())
    closely = asked if policy.group or policy.spans else None
    behind = Behind(
        looked.tables.seen_from(looked.fresh.num_rows), looked.fresh, model.specs, looking=closely
    )
    second = _SecondLook(policy, looked, behind, _sources(request, planned))
    written = Written(model.text, sampling.stop)
    attention = Attention()
    chooser = Chooser(chosen, planned.tokens, device=model.device)
    read, documents = looked.read, tuple(s.document for s in looked.composed.table)
    for position in count(looked.composed.end):
        step = chooser.step(read, documents)
        if not written.tokens:
            clock.lap("prefill")
        piece = written.add(step.token, step.logprobs)
        attention.add(step.documents, step.mass, step.focus, step.columns)
        second.note(step)
        if piece is not None:
            yield piece
        if step.is_last or written.stopped:
            break
        read, documents = (yield behind.want(step.token, position)), behind.documents
    if (rest := written.finish()) is not None:
        yield rest
    ended_early = written.stopped or _ended_early(model, step, sampling)
    uses = _uses(model, planned, loaded, looked, attention, behind)
    caches.settle(loaded)
    yield Answer(
        written.text,
        tuple(written.tokens),
        "stop" if ended_early else "length",
        uses,
        _usage(planned, loaded, looked, len(written.tokens)),
        clock.timing(),
        planned,
        policy.name,
        looked.risk,
        looked.in_full,
        None if sampling.logprobs is None else tuple(written.logprobs),
        caches.trace([span.key for span in planned.cached], loaded, planned.num_tokens),
        layers=tuple(tuple(layer.get(n) for n in range(len(loaded))) for layer in looked.layers),
        question_at=looked.question_at,
    )


def _look(
    caches: Caches, request: Request, planned: PromptPlan, clock: Laps, stride: int
) -> Work[tuple[list[Loaded], Look]]:
    """Load the documents and read the question.

    Layers are loaded as they are needed, so damage shows in the middle of reading: the entry is set aside
    then, and the next try reads its document anew.
    """
    policy = request.policy
    tries_by_layer = 1 + len(planned.cached)
    behind = prefix_tokens(caches.model, request)
    texts = [span.entry for span in planned.cached]
    contexts = _contexts(caches, request, planned)
    while True:
        loaded = yield from caches.loading(behind, texts, by_layer=tries_by_layer > 0, contexts=contexts)
        prefix = caches.prefix(planned.prefix.tokens) if planned.prefix else None
        clock.lap("load")
        try:
            loaded = rows_of(caches.model, planned, loaded)
            arrangement = compose(
                planned, prefix, [document.kv for document in loaded], _sources(request, planned)
            )
            room = request.sampling.max_new_tokens
            looked = yield from looking(caches.model, arrangement, policy, max_new_tokens=room, stride=stride)
            if policy.second_look is not None:
                for segment in looked.everyone:
                    _ = list(segment.kv.layers)  # a damaged layer is to show now
        except CacheMiss:
            tries_by_layer -= 1
        else:
            return loaded, looked


def _contexts(caches: Caches, request: Request, planned: PromptPlan) -> list[Tokens] | None:
    """What each document's rows are encoded behind, beside the prefix; None: nothing."""
    names = _names(request.chunks, planned)
    told = request.contexts
    if isinstance(request.chunks, KnownTexts):
        told = {**request.chunks.contexts(names), **told}
    return [joined_tokens(caches.model.text, told.get(name, ())) for name in names] if told else None


def _key(caches: Caches, request: Request, span: Cached) -> EntryKey:
    """The name of the entry that a span's rows come from."""
    planned = PromptPlan((span,))
    context = (_contexts(caches, request, planned) or [()])[0]
    return EntryKey(caches.fingerprint(prefix_tokens(caches.model, request) + context), span.entry)


def _names(chunks: Mapping[str, str] | Finder, planned: PromptPlan) -> list[str]:
    """The chunk of each span; where several chunks have its text, each in turn."""
    if not isinstance(chunks, Mapping):
        return [span.key for span in planned.cached]
    left: dict[str, list[str]] = {}
    for name, text in chunks.items():
        left.setdefault(text.strip(), []).append(name)
    twins = [left.get(span.text.strip(), []) for span in planned.cached]
    return [t.pop(0) if t else span.key for span, t in zip(planned.cached, twins, strict=True)]


def _sources(request: Request, planned: PromptPlan) -> list[str | None]:
    """What each document is a chunk of."""
    return [request.sources.get(name) for name in _names(request.chunks, planned)]


class _SecondLook:
    """Lets the first tokens of the answer read every document, and decides by them who stays."""

    def __init__(self, policy: Policy, looked: Look, behind: Behind, sources: Sequence[str | None]) -> None:
        self._look = policy.second_look
        self._sources = sources
        self._behind = behind
        self._everyone = looked.everyone.seen_from(looked.fresh.num_rows)
        self._steps = 0
        self._scores: dict[int, float] = {}
        if self._everyone.num_documents < 2 or looked.in_full:
            self._look = None
        if self._look is not None:
            behind.change(self._everyone, for_good=False)

    def note(self, step: Step) -> None:
        """Score by one token's row; the first one's read what the question read, and does not count."""
        if self._look is None:
            return
        if self._steps:
            self._add(step)
        self._steps += 1
        if self._steps > self._look.after:
            self._behind.change(self._everyone.without(self._losers(self._look)))
            self._look = None

    def _losers(self, second: SecondLook) -> list[int]:
        """Numbers of the documents that go."""
        numbers = sorted(self._scores)
        groups = groups_of([self._sources[n] for n in numbers], second.together)
        scores = scores_of([self._scores[n] for n in numbers], groups, second.together)
        keep = Pruning(keep=second.keep).num_kept(len(groups))
        best_first = sorted(range(len(groups)), key=lambda g: (-scores[g], g))
        return [numbers[i] for g in best_first[keep:] for i in groups[g]]

    def _add(self, step: Step) -> None:
        assert self._look is not None
        places = [i for i, number in enumerate(step.documents) if number is not None]
        for layer in range(len(step.mass)):
            mass, focus = step.mass[layer, places, None], step.focus[layer, places, None]
            for i, score in zip(places, self._look.scorer.score(layer, mass, focus), strict=True):
                number = step.documents[i]
                assert number is not None
                self._scores[number] = self._scores.get(number, 0.0) + score


def prefix_tokens(model: Model, request: Request) -> tuple[int, ...]:
    """Tokens that the request's documents are encoded behind."""
    return model.text.tokenize(request.prefix, first=not request.is_rendered)


def _plan(model: Model, request: Request) -> PromptPlan:
    if not request.prompt:
        raise InputError("the prompt is empty; give a question")
    text = model.text

    def first(piece: str) -> tuple[int, ...]:
        return text.tokenize(piece, first=not request.is_rendered)

    starts_with_lead = bool(text.lead) and text.tokenize(request.prompt[:64])[: len(text.lead)] == text.lead
    return plan(
        request.prompt,
        request.chunks,
        prefix=request.prefix,
        tokenize=text.tokenize,
        first=text.tokenize if starts_with_lead else first,
        ends=text.ends,
        min_tokens=request.chunks.min_tokens if isinstance(request.chunks, KnownTexts) else 1,
    )


def _check(model: Model, planned: PromptPlan, policy: Policy) -> None:
    """Refuse what cannot be answered, before anything is loaded or read."""
    if not planned.num_tokens:
        raise InputError("the prompt has no tokens; give a question")
    lengths = [len(span.tokens) for span in planned.cached]
    least = planned.num_tokens - sum(lengths) + max(lengths, default=0)
    limit = policy.placement.limit(model.max_length)
    if least >= limit and policy.placement.beyond != "extrapolate":
        raise ContextOverflow(
            f"the prompt has {planned.num_tokens} tokens and the model reads {limit}; documents can share "
            f"positions, but {least} tokens cannot: retrieve fewer or shorter documents"
        )


def _within(model: Model, looked: Look, request: Request) -> Sampling:
    """The settings with no more tokens than there are positions for."""
    placement = request.policy.placement
    limit = placement.limit(model.max_length)
    room = limit - looked.composed.end
    if placement.beyond == "extrapolate":
        room = max(room, request.sampling.max_new_tokens)
    if room < 1:
        raise ContextOverflow(
            f"the prompt takes {looked.composed.end} positions and the model reads {limit}; "
            "retrieve fewer or shorter documents"
        )
    return replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, room))


def _ended_early(model: Model, last: Step, sampling: Sampling) -> bool:
    """At an end mark, or because the form that was asked for is complete."""
    return last.is_complete or (not sampling.ignore_eos and last.token in end_tokens(model))


def _uses(
    model: Model,
    planned: PromptPlan,
    loaded: Sequence[Loaded],
    looked: Look,
    attention: Attention,
    behind: Behind,
) -> tuple[DocumentUse, ...]:
    question = looked.question_mass
    best = sorted(range(len(loaded)), key=attention.focus, reverse=True)[:_WITH_SPANS]
    return tuple(
        DocumentUse(
            span.key,
            len(span.tokens),
            document.is_hit,
            attention.mass(number),
            attention.focus(number),
            question.get(number, 0.0),
            looked.focus.dropped_at.get(number),
            number in behind.documents,
            _span(model, document, attention, number) if number in best else None,
        )
        for number, (span, document) in enumerate(zip(planned.cached, loaded, strict=True))
    )


def _span(model: Model, document: Loaded, attention: Attention, number: int) -> Span | None:
    found = attention.span(number)
    if found is None:
        return None
    start, end, mass = found
    return Span(start, end, model.text.decode(document.kv.tokens[start:end]).strip(), mass)


def _usage(planned: PromptPlan, loaded: Sequence[Loaded], looked: Look, num_new: int) -> Usage:
    prefix = planned.prefix.tokens if planned.prefix else ()
    ready = [document.kv for document in loaded if document.is_hit]
    whole = planned.num_tokens
    cached = min(whole - 1, len(prefix) + sum(kv.num_tokens for kv in ready))
    return Usage(
        whole,
        cached,
        num_new,
        recomputed_tokens=looked.recomputed,
        cached_bytes=sum(kv.num_bytes for kv in ready),
        read_bytes=sum(kv.num_bytes_touched for kv in ready),
        cached_by_tier=hits_by_tier(planned, loaded),
    )

"""The recipe of an answer: plan, load, compose, read, decode; runs on the thread that owns the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from kvrag.answer import Answer, DocumentUse, FinishReason, Timing, Usage
from kvrag.attention import FreshRows
from kvrag.caches import Caches, Loaded
from kvrag.compose import Composed, compose
from kvrag.config import Sampling
from kvrag.decode import Step, choice, steps
from kvrag.errors import ContextOverflow, InputError
from kvrag.matching import ChunkMatcher
from kvrag.model import Model
from kvrag.plan import PromptPlan, plan
from kvrag.prefill import read_prompt
from kvrag.text import Decoding


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked.

    Attributes:
        prompt: the text as the model is to see it.
        chunks: texts that may stand in the prompt, by name.
        prefix: text that the chunks are encoded behind.
        is_rendered: the prompt came out of a chat template, which wrote any BOS itself.
        sampling: how the answer is chosen.
    """

    prompt: str
    chunks: Mapping[str, str] | ChunkMatcher
    prefix: str
    is_rendered: bool
    sampling: Sampling


def answer(caches: Caches, request: Request) -> Iterator[str | Answer]:
    """Pieces of text as they become certain, then the finished answer.

    Raises:
        InputError: the prompt is empty, or the tokenizer makes nothing of it.
        ContextOverflow: the prompt leaves no room for an answer.
    """
    clock = _Clock()
    model = caches.model
    planned = _plan(model, request)
    clock.lap("plan")
    sampling = _within(model, planned, request.sampling)
    documents = caches.documents(prefix_tokens(model, request), [span.tokens for span in planned.cached])
    prefix = caches.prefix(planned.prefix.tokens) if planned.prefix else None
    composed = compose(planned, prefix, [d.kv for d in documents])
    clock.lap("load")
    chosen = choice(model, composed.prompt, sampling)
    fresh = FreshRows(model.num_layers)
    first = read_prompt(model, composed.table, composed.tokens, composed.positions, fresh)
    decoding = Decoding(model.text, request.sampling.stop)
    tokens: list[int] = []
    seen: list[Step] = []
    for step in steps(model, composed.table, fresh, composed.prompt, first, chosen, position=composed.end):
        if not tokens:
            clock.lap("prefill")
        tokens.append(step.token)
        seen.append(step)
        if piece := decoding.push(step.token):
            yield piece
        if step.is_last or decoding.stopped:
            break
    if rest := decoding.finish():
        yield rest
    ended_early = decoding.stopped or _is_end(model, tokens[-1], sampling)
    yield _finished(
        planned,
        documents,
        composed,
        seen,
        decoding,
        tokens,
        clock,
        "stop" if ended_early else "length",
    )


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
    )


def _within(model: Model, planned: PromptPlan, sampling: Sampling) -> Sampling:
    if not planned.num_tokens:
        raise InputError("the prompt has no tokens; give a question")
    room = model.max_length - planned.num_tokens
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {planned.num_tokens} tokens and the model reads {model.max_length}; "
            "retrieve fewer or shorter documents"
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _is_end(model: Model, token: int, sampling: Sampling) -> bool:
    ends = model.network.generation_config.eos_token_id
    return not sampling.ignore_eos and token in (ends if isinstance(ends, list) else [ends])


def _finished(
    planned: PromptPlan,
    documents: list[Loaded],
    composed: Composed,
    seen: list[Step],
    decoding: Decoding,
    tokens: list[int],
    clock: _Clock,
    reason: FinishReason,
) -> Answer:
    timing = clock.timing()
    mass, focus = _shares(composed, [s.mass for s in seen]), _shares(composed, [s.focus for s in seen])
    whole = sum(focus) or 1.0
    uses = tuple(
        DocumentUse(span.key, len(span.tokens), loaded.is_hit, m, f / whole)
        for span, loaded, m, f in zip(planned.cached, documents, mass, focus, strict=True)
    )
    ready = [s for s in composed.table if s.document is None or documents[s.document].is_hit]
    usage = Usage(len(composed.prompt), sum(s.kv.num_tokens for s in ready), len(tokens))
    return Answer(decoding.text, tuple(tokens), reason, uses, usage, timing, planned)


def _shares(composed: Composed, seen: list[torch.Tensor]) -> list[float]:
    """Each document's share of what the rows that chose the answer's tokens looked at.

    Args:
        composed: the prompt.
        seen: [L, S] for each token.
    """
    numbers = [i for i, s in enumerate(composed.table) if s.document is not None]
    return [float(x) for x in torch.stack(seen)[..., numbers].mean(dim=(0, 1))]


class _Clock:
    """Laps of one answer."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def timing(self) -> Timing:
        laps = self._laps
        return Timing(
            plan=laps["plan"],
            load=laps["load"],
            prefill=laps["prefill"],
            first_token=sum(laps.values()),
            decode=time.perf_counter() - self._last,
        )

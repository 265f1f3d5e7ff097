"""What a question gives back: text, what it rests on, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvrag.citations import Seen, Span
from kvrag.focus.risk import Risk
from kvrag.plan import PromptPlan
from kvrag.trace import Trace

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was to the model at its place, before anything shaped the choice.

    Attributes:
        token: its id.
        text: what it says on its own; a special token's name, a replacement character for part of one.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at this place, the best first, if they were asked for.
    """

    token: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of an answer that became certain, and the tokens it is made of.

    Pieces in order have the answer's text and its tokens, each of them once. A token comes with the piece
    that completes its text; tokens that say nothing (the end mark) or whose text is no part of the answer (a
    stop string) come last, in a piece that may have no text.

    Attributes:
        text: maybe empty in the last piece.
        tokens: their ids.
        logprobs: for each of the tokens; empty unless `Sampling.logprobs` asks for them.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class DocumentUse:
    """One document of a prompt.

    Attributes:
        key: the name it was given under.
        num_tokens: its length.
        is_hit: its rows came from the store; otherwise it was read for this answer.
        mass: its share of the attention, while the answer's tokens were chosen, mean over layers and heads.
        focus: its share among the documents of squared attention: where heads that look at one place look.
            Says better than `mass` which document an answer rests on.
        question_mass: as `mass`, while the question was read.
        dropped_at: first layer of the question's reading that did not read it any more; None: all did.
        is_read: the answer's tokens read it; without a second look the same as not dropped.
        span: the place in it that was looked at most, for the best documents of a policy with `spans`.
    """

    key: str
    num_tokens: int
    is_hit: bool
    mass: float
    focus: float
    question_mass: float = 0.0
    dropped_at: int | None = None
    is_read: bool = True
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer.

    Attributes:
        prompt_tokens: the whole prompt.
        cached_tokens: of those, how many came from prebuilt rows.
        new_tokens: tokens of the answer, the end mark included.
        recomputed_tokens: of the documents' tokens that came from prebuilt rows, how many were read again.
        cached_bytes: bytes of all documents' prebuilt rows.
        read_bytes: of those, how many were read: documents dropped at a layer are not read below it.
        cached_by_tier: of the cached tokens, those of documents, by the way in which the documents were found
            (see `kvrag.known`).
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    recomputed_tokens: int = 0
    cached_bytes: int = 0
    read_bytes: int = 0
    cached_by_tier: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def read_tokens(self) -> int:
        """Prompt tokens that the model had to read."""
        return self.prompt_tokens - self.cached_tokens + self.recomputed_tokens


@dataclass(frozen=True, slots=True)
class RecalledSpan:
    """Something said before, forgotten since, that came back from an archive for one turn.

    Attributes:
        turn: in which it was said, counted from 0.
        role: who says its first token: "user" or "assistant".
        text: what it says.
        start: tokens of the conversation before it.
        num_tokens: of it.
        mass: share of the turn's attention that it got, mean over layers, heads and tokens.
        is_hit: its rows came from the store; otherwise it was read anew.
    """

    turn: int
    role: str
    text: str
    start: int
    num_tokens: int
    mass: float
    is_hit: bool = True


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a session's turn read, and what its memory holds behind it; in tokens.

    Attributes:
        pinned: of system prompt and documents; always there.
        read: of the conversation, read in this turn, the answer's own not counted.
        said: of the conversation so far, this answer included.
        remembered: of those, how many at least one layer and head still holds.
        share: of the conversation, which share an average layer and head holds.
        recalled: of spans that came back from an archive for this turn.
        spans: those spans.
        went_back: turns that were taken back because the history is another one.
        anew: the whole conversation was read, because none of what was known began like it.
        pinned_read: of `pinned`, read for this turn: what had no rows yet, neither in the store nor from
            before.
    """

    pinned: int
    read: int
    said: int
    remembered: int
    share: float
    recalled: int = 0
    went_back: int = 0
    anew: bool = False
    spans: tuple[RecalledSpan, ...] = ()
    pinned_read: int = 0

    @property
    def forgotten(self) -> int:
        """Tokens of the conversation that no layer and head holds any more."""
        return self.said - self.remembered


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that the steps of one answer took, those included in which others had their turns.

    Attributes:
        plan: finding the documents in the prompt, tokenising.
        load: rows from the store, or reading documents that it lacks.
        prefill: reading the fresh tokens.
        first_token: from the start of the work to the first token, all of the above included (TTFT).
        decode: the tokens after the first.
    """

    plan: float
    load: float
    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without special tokens and stop strings.
        tokens: as the model chose them, the end mark included.
        finish_reason: "stop" at an end mark or a stop string, "length" at the longest allowed.
        documents: the prompt's documents, in order.
        usage: token counts.
        timing: seconds.
        plan: which parts of the prompt were read and which came from caches.
        policy: name of the policy.
        risk: signs that full attention might have answered otherwise.
        in_full: the documents were read in full because the risk was above the policy's limit.
        logprobs: for each of the tokens; None unless `Sampling.logprobs` asks for them.
        trace: where the documents' rows came from, and why from there.
        layers: for each layer and each of the documents, in order, where it stood and what attention it got
            while the question was read, before rows were read again; None where the layer did not read it.
            A document that lost a heat has None in every layer.
        question_at: position of the first token behind the documents, while the question was read.
        memory: of a session's answer, what its memory holds.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    documents: tuple[DocumentUse, ...]
    usage: Usage
    timing: Timing
    plan: PromptPlan
    policy: str = "plain"
    risk: Risk | None = None
    in_full: bool = False
    logprobs: tuple[TokenLogprob, ...] | None = None
    trace: Trace = field(default_factory=Trace)
    layers: tuple[tuple[Seen | None, ...], ...] = ()
    question_at: int = 0
    memory: MemoryUse | None = None


def report(answer: Answer) -> dict[str, Any]:
    """What an answer cost and rests on, as plain values that can be stored: what adapters tell of it.

    `documents` has one item for each document of the prompt; `memory` is there for a session's answer only:
    what `MemoryUse` says, and `forgotten`.
    """
    told: dict[str, Any] = {
        "usage": asdict(answer.usage),
        "documents": [
            {
                "key": use.key,
                "num_tokens": use.num_tokens,
                "is_hit": use.is_hit,
                "mass": use.mass,
                "focus": use.focus,
                "question_mass": use.question_mass,
                "dropped_at": use.dropped_at,
            }
            for use in answer.documents
        ],
        "seconds": asdict(answer.timing),
        "policy": answer.policy,
        "in_full": answer.in_full,
    }
    if answer.memory is not None:
        told["memory"] = {**asdict(answer.memory), "forgotten": answer.memory.forgotten}
    return told

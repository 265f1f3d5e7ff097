"""What a question gives back: text, what it rests on, what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvrag.plan import PromptPlan

FinishReason = Literal["stop", "length"]


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
    """

    key: str
    num_tokens: int
    is_hit: bool
    mass: float
    focus: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer.

    Attributes:
        prompt_tokens: the whole prompt.
        cached_tokens: of those, how many came from prebuilt rows.
        new_tokens: tokens of the answer, the end mark included.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int

    @property
    def read_tokens(self) -> int:
        """Prompt tokens that the model had to read."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that the steps of one answer took.

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
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    documents: tuple[DocumentUse, ...]
    usage: Usage
    timing: Timing
    plan: PromptPlan

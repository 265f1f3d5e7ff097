"""From a plan and its caches to what attention reads: placed segments and the fresh tokens around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrag.plan import Cached, Literal, PromptPlan
from kvrag.segments import KV, Segment, SegmentTable


@dataclass(frozen=True, slots=True)
class Composed:
    """A prompt, ready to be read.

    Attributes:
        table: prefix and documents at their places; positions run through the prompt without gaps.
        tokens: the fresh tokens, in prompt order.
        positions: of the fresh tokens.
        prompt: all tokens of the prompt, cached ones included.
    """

    table: SegmentTable
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    prompt: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position of the first token of the answer."""
        return len(self.prompt)


def compose(plan: PromptPlan, prefix: KV | None, documents: Sequence[KV]) -> Composed:
    """Place prefix and documents where the plan has them; everything else is fresh.

    A prompt has to end with a fresh token, whose logits begin the answer: if a document or the prefix ends
    it, the last token of that span is read again and its row left out of the segment.

    Args:
        plan: spans of the prompt.
        prefix: rows of the plan's prefix; None if it has none.
        documents: rows of the plan's cached spans, in order.
    """
    caches = iter(documents)
    segments: list[Segment] = []
    tokens: list[int] = []
    positions: list[int] = []
    at = number = 0
    for span in plan.spans:
        end = at + len(span.tokens)
        if isinstance(span, Literal):
            tokens += span.tokens
            positions += range(at, end)
        elif isinstance(span, Cached):
            segments.append(Segment(next(caches), at, first_row=len(tokens), document=number))
            number += 1
        elif prefix is not None and span.tokens:
            segments.append(Segment(prefix, at))
        at = end
    prompt = plan.tokens
    if prompt and (not positions or positions[-1] != at - 1):
        segments[-1] = _shortened(segments[-1])
        tokens.append(prompt[-1])
        positions.append(at - 1)
    return Composed(SegmentTable(tuple(segments)), tuple(tokens), tuple(positions), prompt)


def _shortened(segment: Segment) -> Segment:
    """The segment without its last row."""
    return Segment(
        segment.kv.head(segment.kv.num_tokens - 1), segment.target, segment.first_row, segment.document
    )

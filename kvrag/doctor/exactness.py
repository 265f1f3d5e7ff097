"""Whether caches that are composed and moved give what ordinary computation gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrag.encoding import encode
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import read
from kvrag.segments import KV, Segment, SegmentTable

_MANY = 4  # documents; more would only take longer


@dataclass(frozen=True, slots=True)
class Exactness:
    """Largest relative differences of logits.

    Attributes:
        tolerance: the largest that counts as rounding in this dtype.
        full_error: whole prompt read by kvrag against the same model's ordinary forward pass.
        prefix_error: one document at its own place against the same.
        moved_error: everything moved far along the position axis against unmoved.
    """

    tolerance: float
    full_error: float
    prefix_error: float
    moved_error: float

    @property
    def is_exact(self) -> bool:
        """Composition differs from ordinary computation by rounding only."""
        errors = (self.full_error, self.prefix_error, self.moved_error)
        return all(error <= self.tolerance for error in errors)  # not max(): NaN is larger than nothing


def exactness(model: Model, prefix_text: str, texts: Sequence[str], asked: str) -> Exactness:
    """Prove it on some texts and a question."""
    text = model.text
    prefix_tokens = text.tokenize(prefix_text, first=not text.has_template) or text.tokenize(".")
    documents = [text.tokenize(sample) for sample in texts[:_MANY]]
    question = text.tokenize(f"\n\n{asked}")
    joined = (*prefix_tokens, *(t for d in documents for t in d), *question)
    (prefix,) = encode(model, [prefix_tokens])
    cached = encode(model, documents, prefix)
    composed = _compose_and_read(model, prefix, cached, question)
    first = (*prefix_tokens, *documents[0], *question)
    return Exactness(
        tolerance=1e-4 if model.dtype == torch.float32 else 5e-2,
        full_error=_difference(
            _read_all(model, joined)[-len(question) :], _ordinary_logits(model, joined)[-len(question) :]
        ),
        prefix_error=_difference(
            _compose_and_read(model, prefix, cached[:1], question),
            _ordinary_logits(model, first)[-len(question) :],
        ),
        moved_error=_difference(
            _compose_and_read(model, prefix, cached, question, shift=_far(model, len(joined))), composed
        ),
    )


@torch.inference_mode()
def _ordinary_logits(model: Model, tokens: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: torch.Tensor = model.network(input_ids=ids, use_cache=False).logits
    return logits[0].float()


def _read_all(model: Model, tokens: Sequence[int]) -> torch.Tensor:
    fresh = FreshRows(model.num_layers)
    return read(model, SegmentTable(), tokens, range(len(tokens)), fresh, logits_to_keep=0).logits.float()


def _compose_and_read(
    model: Model, prefix: KV, documents: Sequence[KV], question: Sequence[int], *, shift: int = 0
) -> torch.Tensor:
    segments, at = [], shift
    for number, kv in enumerate((prefix, *documents)):
        segments.append(Segment(kv, at, document=number - 1 if number else None))
        at += kv.num_tokens
    fresh = FreshRows(model.num_layers)
    positions = range(at, at + len(question))
    return read(
        model, SegmentTable(tuple(segments)), question, positions, fresh, logits_to_keep=0
    ).logits.float()


def _far(model: Model, length: int) -> int:
    return max(0, min(10_000, model.max_length - length))


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())

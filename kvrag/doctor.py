"""Proof and measurement for one model: is composing exact, and what does it cost in quality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrag.attention import FreshRows
from kvrag.engine import Engine
from kvrag.model import Model
from kvrag.prefill import encode, read
from kvrag.rotary import LayerSpec
from kvrag.segments import KV, Segment, SegmentTable

_SAMPLES = (
    "The lighthouse of Varn was built in 1871. Its keeper, Ada Holm, kept a journal of every ship that "
    "passed, and noted the weather in it each morning. She retired in 1903.",
    "The library of Osted lends books on four floors. It opens at nine and closes at six, except on "
    "Mondays, when the reading room stays dark. The oldest book is a map of the coast from 1642.",
    "A ferry crosses the Mirrow twice a day. The trip takes forty minutes, and bicycles travel free. In"
    " winter the first boat leaves an hour later because of the ice near the northern pier.",
    "The orchard at Lindal grows apples, pears and plums. In a good year it gives thirty tons of fruit,"
    " most of which is pressed into juice within two days of the harvest.",
)
_QUESTION = "When was the lighthouse of Varn built, and who kept it?"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out about a model.

    Attributes:
        model: its name.
        layers: kinds of layers and how many there are of each.
        tolerance: largest relative difference of logits that counts as rounding in this dtype.
        full_error: whole prompt read by kvrag against the same model's ordinary forward pass.
        prefix_error: one document at its own place against the same.
        moved_error: everything moved far along the position axis against unmoved.
        kl: KL divergence of composed caches from full attention, in nats, mean over question tokens.
        top1: share of question tokens whose likeliest next token is the same.
    """

    model: str
    layers: dict[str, int]
    tolerance: float
    full_error: float
    prefix_error: float
    moved_error: float
    kl: float
    top1: float

    @property
    def is_exact(self) -> bool:
        """Composition differs from ordinary computation by rounding only."""
        errors = (self.full_error, self.prefix_error, self.moved_error)
        return all(error <= self.tolerance for error in errors)  # not max(): NaN is larger than nothing


def examine(engine: Engine) -> Report:
    """Run the proofs and the measurement on sample documents, on the engine's thread."""
    return engine.call(lambda: _examine(engine.model, engine.encoder().prompt.prefix))


def _examine(model: Model, prefix_text: str) -> Report:
    text = model.text
    prefix_tokens = text.tokenize(prefix_text, first=not text.has_template) or text.tokenize(".")
    documents = [text.tokenize(sample) for sample in _SAMPLES]
    question = text.tokenize(f"\n\n{_QUESTION}")
    joined = (*prefix_tokens, *(t for d in documents for t in d), *question)
    ordinary = _ordinary_logits(model, joined)[-len(question) :]
    (prefix,) = encode(model, [prefix_tokens])
    cached = encode(model, documents, prefix)
    composed = _compose_and_read(model, prefix, cached, question)
    first = (*prefix_tokens, *documents[0], *question)
    return Report(
        model=model.name,
        layers=dict(Counter(_kind(spec) for spec in model.specs)),
        tolerance=1e-4 if model.dtype == torch.float32 else 5e-2,
        full_error=_difference(_read_all(model, joined)[-len(question) :], ordinary),
        prefix_error=_difference(
            _compose_and_read(model, prefix, cached[:1], question),
            _ordinary_logits(model, first)[-len(question) :],
        ),
        moved_error=_difference(
            _compose_and_read(model, prefix, cached, question, shift=_far(model, len(joined))), composed
        ),
        kl=_kl(ordinary, composed),
        top1=float((ordinary.argmax(-1) == composed.argmax(-1)).float().mean()),
    )


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


def _kl(full: torch.Tensor, composed: torch.Tensor) -> float:
    p, q = full.log_softmax(-1), composed.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _kind(spec: LayerSpec) -> str:
    window = "full attention" if spec.window is None else f"window of {spec.window}"
    if spec.rotation is None:
        return f"no rotation, {window}"
    rotation = spec.rotation
    return f"rotation of {2 * len(rotation.frequencies)} dimensions ({rotation.layout}), {window}"


def describe(report: Report) -> str:
    """The report in words."""
    kinds = "\n".join(f"  {count} layers: {kind}" for kind, count in report.layers.items())
    verdict = "exact to rounding" if report.is_exact else "NOT exact: do not use this model"
    return (
        f"{report.model}: caches can be re-positioned, {verdict}\n{kinds}\n"
        f"largest relative difference of logits (allowed {report.tolerance:.0e})\n"
        f"  whole prompt read, against an ordinary forward pass    {report.full_error:.1e}\n"
        f"  one cached document, against an ordinary forward pass  {report.prefix_error:.1e}\n"
        f"  all segments moved along the positions, against none   {report.moved_error:.1e}\n"
        f"what independent documents cost ({len(_SAMPLES)} sample documents, against full attention)\n"
        f"  KL divergence {report.kl:.4f} nats, same likeliest token {report.top1:.0%}"
    )

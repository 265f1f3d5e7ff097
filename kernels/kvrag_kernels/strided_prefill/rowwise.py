"""A few query rows at a time against everything: any segments, any device, scores along the way.

All scores of a block of rows are there at once, so the softmax is one operator and the column sums are one
product with the weights: nothing is computed twice, and memory does not grow with rows times columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvrag_kernels.segment_attention.reference import turn_query, visible
from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill.types import Scoring, Strided

_CELLS = 1 << 18  # scores at once, 1 MiB of float32: about what a core keeps close
_NOTHING = float("-inf")


@dataclass(frozen=True, slots=True)
class _Part:
    """One segment as the query heads of one key head read it.

    Attributes:
        query: [G, T, D], float32, turned and scaled.
        keys: [n, D], float32.
        values: [n, Dv], float32.
        seen: [T, n], bool; None: every row sees everything.
        causal: row t sees no column behind t.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor | None
    causal: bool

    def count(self, end: int) -> int:
        """Columns that query rows before `end` can see."""
        return min(end, len(self.keys)) if self.causal else len(self.keys)

    def score(self, rows: slice, softcap: float | None, into: torch.Tensor) -> None:
        """Scores of query rows to the first columns, written to [G, t, count]."""
        groups, num_rows, count = into.shape
        packed = self.query[:, rows].reshape(groups * num_rows, -1)
        torch.matmul(packed, self.keys[:count].T, out=into.view(groups * num_rows, count))
        if softcap is not None:
            into.div_(softcap).tanh_().mul_(softcap)
        if self.seen is not None:
            into.masked_fill_(~self.seen[rows, :count], _NOTHING)


def strided_prefill_rowwise(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
) -> Strided:
    """Attend block by block of query rows; see `strided_prefill` for the arguments."""
    batch, heads, num_rows, _ = query.shape
    groups, lengths = heads // segments[0].keys.shape[1], [rows.keys.shape[2] for rows in segments]
    out = query.new_empty((batch, heads, num_rows, segments[0].values.shape[-1]))
    lse = query.new_empty((batch, heads, num_rows), dtype=torch.float32)
    mass = query.new_empty((len(segments), batch, heads, num_rows), dtype=torch.float32)
    sums = query.new_zeros((heads, sum(lengths)), dtype=torch.float32)
    step = max(1, _CELLS // (groups * sum(lengths)))
    for b, own, parts in _heads(query, segments, turn, scale):
        extra = None if sinks is None else sinks[own, None].float()
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            everything, lse[b, own, rows] = _shares(_scores(parts, rows, softcap), extra)
            probs = everything.split([part.count(rows.stop) for part in parts], dim=-1)
            out[b, own, rows] = _weighted(parts, probs).to(out.dtype)
            mass[:, b, own, rows] = torch.stack([p.sum(-1) for p in probs])
            if scoring is not None:
                weights = scoring.weights[rows]
                for p, into in zip(probs, sums[own].split(lengths, dim=-1), strict=True):
                    into[:, : p.shape[-1]] += torch.matmul(weights, p)
    return Strided(out, lse, mass, None if scoring is None else scoring.keep(sums))


def _heads(
    query: torch.Tensor, segments: Sequence[Rows], turn: Turn | None, scale: float
) -> Iterator[tuple[int, slice, list[_Part]]]:
    """Each sequence's key heads, with the query heads that share them, all in float32."""
    groups, num_rows = query.shape[1] // segments[0].keys.shape[1], query.shape[2]
    seen = [None if rows.is_open else visible(rows, num_rows) for rows in segments]
    for b in range(query.shape[0]):
        for head in range(segments[0].keys.shape[1]):
            own = slice(head * groups, (head + 1) * groups)
            turned = turn_query(query[b : b + 1, own], turn, len(segments))[:, 0].float() * scale
            parts = []
            for q, rows, mask in zip(turned, segments, seen, strict=True):
                keys, values = rows.keys[b % len(rows.keys), head], rows.values[b % len(rows.values), head]
                parts.append(_Part(q, keys.float(), values.float(), mask, rows.causal))
            yield b, own, parts


def _scores(parts: Sequence[_Part], rows: slice, softcap: float | None) -> torch.Tensor:
    """[G, t, columns that these rows can see of each segment]."""
    counts = [part.count(rows.stop) for part in parts]
    groups = parts[0].query.shape[0]
    scores = parts[0].query.new_empty((groups, rows.stop - rows.start, sum(counts)))
    for part, into in zip(parts, scores.split(counts, dim=-1), strict=True):
        part.score(rows, softcap, into)
    return scores


def _shares(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [G, t, n] and log-sum-exp [G, t] of rows of scores."""
    top, probs = scores.amax(-1), scores.softmax(-1)
    lse = top - probs.amax(-1).log()  # the largest score's probability is one over the sum
    blind = top == _NOTHING
    if bool(blind.any()):
        probs.masked_fill_(blind[..., None], 0)
        lse.masked_fill_(blind, _NOTHING)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks)
        probs.mul_((lse - total).exp()[..., None])
        lse = total
    return probs, lse


def _weighted(parts: Sequence[_Part], probs: Sequence[torch.Tensor]) -> torch.Tensor:
    """[G, t, Dv], float32: values by their probabilities."""
    out = torch.matmul(probs[0], parts[0].values[: probs[0].shape[-1]])
    for part, p in zip(parts[1:], probs[1:], strict=True):
        out += torch.matmul(p, part.values[: p.shape[-1]])
    return out

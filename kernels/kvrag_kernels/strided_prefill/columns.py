"""Column sums by a second look at the keys, block by block, on any device.

The log-sum-exp of a row says what its scores are exponentiated against, so every block of columns can be
scored on its own, and columns whose score is not needed are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from kvrag_kernels.segment_attention.reference import turn_query, visible
from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill.types import Scoring

_LOG2E = 1.4426950408889634
_COLUMNS, _ROWS = 512, 512  # a block of scores is 1 MiB of float32: about what a core keeps close
_NOTHING = -1e30  # as an exponent; minus infinity would become NaN in a product with 0


def exponents(lse: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What is added to a row's scores before they are exponentiated.

    Args:
        lse: [..., T], float32.
        weights: [T], float32, not negative.

    Returns:
        [..., T], float32: log(weight) - lse; very negative where the row sees nothing or does not count.
    """
    return torch.where(lse == float("-inf"), _NOTHING, weights.log() - lse).clamp_min(_NOTHING)


def column_scores_blockwise(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    lse: torch.Tensor,
    scoring: Scoring,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Score the columns; see `column_scores` for the arguments."""
    turned = turn_query(query, turn, len(segments))[:, 0]
    return summed_columns(turned, segments, lse[0], scoring, scale=scale, softcap=softcap)


def summed_columns(
    turned: torch.Tensor,
    segments: Sequence[Rows],
    lse: torch.Tensor,
    scoring: Scoring,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """[H, N]: the same for queries [S, H, T, D] that are turned, and log-sum-exps [H, T]."""
    lengths = [rows.keys.shape[2] for rows in segments]
    sums = lse.new_zeros((turned.shape[1], sum(lengths)))
    bias = exponents(lse, scoring.weights)[..., None] * _LOG2E
    # Exponents are to base 2: where exp underflows, MKL's takes a hundred times as long.
    scale = scale if softcap is not None else scale * _LOG2E
    blocks = _Blocks(bias, segments[0].keys.shape[1], turned.shape[3], softcap)
    current = -1
    for i, first, last in scoring.spans(lengths):
        if i != current:
            blocks.begin(turned[i], segments[i], scale)
            current = i
        into = sums.split(lengths, dim=-1)[i]
        for start in range(first, last, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, last))
            into[:, columns] = blocks.sum(columns)
    return sums


class _Blocks:
    """Sums of blocks of columns, all heads at once, segment after segment.

    Queries and scores are written to the same memory again and again: new memory costs more than what is
    done with it.
    """

    def __init__(self, bias: torch.Tensor, kv_heads: int, dim: int, softcap: float | None) -> None:
        """Take what is added to the rows' scores, [H, T, 1]."""
        heads, num_rows, _ = bias.shape
        self.softcap, self.dim = softcap, dim
        self.bias = bias.view(kv_heads, -1, num_rows, 1).transpose(1, 2).contiguous()  # [K, T, G, 1]
        # Without a soft cap the exponent is one product: (query, bias) . (key, 1).
        self.query = bias.new_empty((*self.bias.shape[:3], dim + (softcap is None)))
        if softcap is None:
            self.query[..., dim:] = self.bias
        self.step = max(1, _ROWS // heads)
        self.room = bias.new_empty(self.step * heads * _COLUMNS)

    def begin(self, query: torch.Tensor, rows: Rows, scale: float) -> None:
        """Go on with a segment and its queries [H, T, D]."""
        packed = query.view(self.query.shape[0], -1, query.shape[1], self.dim).transpose(1, 2)
        torch.mul(packed.float(), scale, out=self.query[..., : self.dim])
        self.rows, self.seen = rows, None if rows.is_open else visible(rows, query.shape[1])

    def sum(self, columns: slice) -> torch.Tensor:
        """[H, n]: over all query rows that see any of these columns."""
        keys = self.rows.keys[0, :, columns].float()
        if self.softcap is None:
            keys = torch.cat((keys, keys.new_ones((*keys.shape[:2], 1))), dim=-1)
        kv_heads, num_rows, groups, _ = self.query.shape
        total = keys.new_zeros((kv_heads, groups, keys.shape[1]))
        begin = columns.start if self.rows.causal else self.rows.first_row
        for start in range(begin, num_rows, self.step):
            part = slice(start, min(start + self.step, num_rows))
            shape = (kv_heads, part.stop - start, groups, keys.shape[1])
            scores = self.room[: prod(shape)].view(shape)
            torch.bmm(self.query[:, part].flatten(1, 2), keys.mT, out=scores.flatten(1, 2))
            total += self._exponentiated(scores, part, columns).sum(1)
        return total.flatten(0, 1)

    def _exponentiated(self, scores: torch.Tensor, part: slice, columns: slice) -> torch.Tensor:
        """Weighted probabilities [K, t, G, n] of scores, in place."""
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap * _LOG2E).add_(self.bias[:, part])
        if self.seen is not None and not (self.rows.causal and part.start >= columns.stop):
            # Adding is several times as fast as filling by a mask that all heads share.
            scores.add_(torch.where(self.seen[part, None, columns], 0.0, _NOTHING))
        return scores.exp2_()

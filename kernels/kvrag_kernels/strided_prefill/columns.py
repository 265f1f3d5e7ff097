"""Column sums by a second look at the keys, block by block, on any device.

The log-sum-exp of a row says what its scores are exponentiated against, so every block of columns can be
scored on its own, and columns whose score is not needed are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    # One block's scores, written again and again: new memory costs more than what is done with it.
    room = lse.new_empty(max(_ROWS, turned.shape[1]) * _COLUMNS)
    blocks: dict[int, _Blocks] = {}
    for i, first, last in scoring.spans(lengths):
        if i not in blocks:
            blocks[i] = _Blocks(turned[i].float() * scale, bias, segments[i], softcap, room)
        into = sums.split(lengths, dim=-1)[i]
        for start in range(first, last, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, last))
            into[:, columns] = blocks[i].sum(columns)
    return sums


class _Blocks:
    """Sums of blocks of columns of one segment, all heads at once."""

    def __init__(
        self,
        query: torch.Tensor,
        bias: torch.Tensor,
        rows: Rows,
        softcap: float | None,
        room: torch.Tensor,
    ) -> None:
        """Take queries [H, T, D], scaled, and what is added to their scores, [H, T, 1]."""
        # Without a soft cap the exponent is one product: (query, bias) . (key, 1).
        query = query if softcap is not None else torch.cat((query, bias), dim=-1)
        self.query = query.unflatten(0, (rows.keys.shape[1], -1))
        self.bias = bias.view(*self.query.shape[:3], 1)
        self.rows, self.softcap, self.room = rows, softcap, room
        self.seen = None if rows.is_open else visible(rows, query.shape[1])

    def sum(self, columns: slice) -> torch.Tensor:
        """[H, n]: over all query rows that see any of these columns."""
        keys = self.rows.keys[0, :, columns].float()
        if self.softcap is None:
            keys = torch.cat((keys, keys.new_ones((*keys.shape[:2], 1))), dim=-1)
        kv_heads, groups, num_rows, _ = self.query.shape
        total = keys.new_zeros((kv_heads, groups, keys.shape[1]))
        step = max(1, _ROWS // (kv_heads * groups))
        for start in range(columns.start if self.rows.causal else self.rows.first_row, num_rows, step):
            part = slice(start, min(start + step, num_rows))
            shape = (kv_heads, groups * (part.stop - start), keys.shape[1])
            scores = self.room[: shape[0] * shape[1] * shape[2]].view(shape)
            torch.bmm(self.query[:, :, part].flatten(1, 2), keys.mT, out=scores)
            total += self._exponentiated(scores.unflatten(1, (groups, -1)), part, columns).sum(2)
        return total.flatten(0, 1)

    def _exponentiated(self, scores: torch.Tensor, part: slice, columns: slice) -> torch.Tensor:
        """Weighted probabilities [K, G, t, n] of scores, in place."""
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap * _LOG2E).add_(self.bias[:, :, part])
        if self.seen is not None and not (self.rows.causal and part.start >= columns.stop):
            # Adding is several times as fast as filling by a mask that all heads share.
            scores.add_(torch.where(self.seen[part, columns], 0.0, _NOTHING))
        return scores.exp2_()

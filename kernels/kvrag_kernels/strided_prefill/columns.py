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
    num_rows, lengths = query.shape[2], [rows.keys.shape[2] for rows in segments]
    sums = query.new_zeros((query.shape[1], sum(lengths)), dtype=torch.float32)
    split = sums.split(lengths, dim=-1)
    bias = exponents(lse[0], scoring.weights)[..., None]
    turned = turn_query(query, turn, len(segments))[:, 0]
    for i, first, last in scoring.spans(lengths):
        rows = segments[i]
        seen = None if rows.is_open else visible(rows, num_rows)
        groups = query.shape[1] // rows.keys.shape[1]
        for head, keys in enumerate(rows.keys[0, :, first:last]):
            own = slice(head * groups, (head + 1) * groups)
            q = turned[i, own].float() * scale
            for start in range(first, last, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, last))
                k = keys[start - first : columns.stop - first].float()
                split[i][own, columns] = _block(q, k, bias[own], rows, columns, seen, softcap)
    return sums


def _block(
    query: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    rows: Rows,
    columns: slice,
    seen: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """[G, n]: sums over all query rows [G, T, D] that see any of these columns."""
    groups, num_rows, _ = query.shape
    total = query.new_zeros((groups, len(keys)))
    # Without a soft cap the exponent is one product: (query, bias) . (key, 1).
    if softcap is None:
        query = torch.cat((query, bias), dim=-1)
        keys = torch.cat((keys, keys.new_ones((len(keys), 1))), dim=-1)
    step = max(1, _ROWS // groups)
    for start in range(columns.start if rows.causal else rows.first_row, num_rows, step):
        part = slice(start, min(start + step, num_rows))
        scores = torch.mm(query[:, part].flatten(0, 1), keys.T).view(groups, -1, len(keys))
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap).add_(bias[:, part])
        if seen is not None and not (rows.causal and part.start >= columns.stop):
            scores.masked_fill_(~seen[part, columns], _NOTHING)
        total += scores.exp_().sum(1)
    return total

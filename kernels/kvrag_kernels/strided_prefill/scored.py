"""A stride on CPU over rows brought together, scores included (see `segment_attention.gathered`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.segment_attention.gathered import Block, Gathered
from kvrag_kernels.segment_attention.types import Rows, Turn
from kvrag_kernels.strided_prefill.types import Scoring, Strided


def strided_prefill_gathered(
    query: torch.Tensor,
    segments: Sequence[Rows],
    turn: Turn | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    scoring: Scoring | None = None,
) -> Strided:
    """Attend to the gathered rows; see `strided_prefill` for the arguments."""
    gathered = Gathered(query, segments, turn, scale)
    sums = None
    if scoring is not None:
        sums = _Sums(scoring, query.shape[1], gathered)
    gathered.attend(sinks, sums)
    found = gathered.attended()
    assert found.lse is not None
    return Strided(found.out, found.lse, found.mass, None if sums is None else sums.found.flatten(0, 1))


class _Sums:
    """Weighted sums of the wanted columns, each query head of a group for itself.

    Attributes:
        found: [K, G, N].
    """

    def __init__(self, scoring: Scoring, num_heads: int, gathered: Gathered) -> None:
        self._scoring, self._groups = scoring, gathered.groups
        shape = (num_heads // gathered.groups, gathered.groups, sum(gathered.lengths))
        self.found = scoring.weights.new_zeros(shape)

    def __call__(self, head: int, block: Block, probs: torch.Tensor, total: torch.Tensor) -> None:
        """Add a block's."""
        weights = self._scoring.weights[block.first : block.end, None] / total.view(-1, self._groups)
        by_group = probs.view(-1, self._groups, block.columns)
        columns = self._scoring.columns
        for first, last in columns if columns is not None else ((0, block.columns),):
            wanted = slice(first, min(last, block.columns))
            for group in range(self._groups) if first < wanted.stop else ():
                self.found[head, group, wanted].addmv_(by_group[:, group, wanted].T, weights[:, group])

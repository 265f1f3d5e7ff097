"""What a stride is scored by and what its attention gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from kvrag_kernels.segment_attention.types import Attended

Reduction = Literal["mean", "max", "median"]


@dataclass(frozen=True, slots=True)
class Scoring:
    """Which columns get a score, and what each query row's attention counts for it.

    Columns are counted through all segments, in their order.

    Attributes:
        weights: [T], float32: a column's score is the sum over query rows of weight times probability.
        columns: half-open ranges that are scored, ascending, not overlapping; None: all columns.
    """

    weights: torch.Tensor
    columns: tuple[tuple[int, int], ...] | None = None

    def check(self, num_rows: int, num_columns: int) -> None:
        """Refuse what does not fit a call.

        Raises:
            ValueError: not one weight per query row, or ranges that overlap or lie outside the columns.
        """
        if self.weights.shape != (num_rows,):
            raise ValueError(f"{num_rows} query rows need as many weights, not {list(self.weights.shape)}")
        flat = [0, *(end for span in self.columns or () for end in span), num_columns]
        if flat != sorted(flat):
            raise ValueError(
                f"scored columns must be ascending ranges within 0..{num_columns}, not {self.columns}"
            )

    def spans(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """The scored columns segment by segment: segment, first column in it, column after the last."""
        found = []
        for first, last in self.columns if self.columns is not None else ((0, sum(lengths)),):
            for i, end in enumerate(accumulate(lengths)):
                start = end - lengths[i]
                if max(first, start) < min(last, end):
                    found.append((i, max(first, start) - start, min(last, end) - start))
        return found

    def keep(self, sums: torch.Tensor) -> torch.Tensor:
        """[H, N] without the columns that were not asked for."""
        if self.columns is None:
            return sums
        kept = torch.zeros_like(sums)
        for first, last in self.columns:
            kept[:, first:last] = sums[:, first:last]
        return kept


@dataclass(frozen=True, slots=True)
class Strided:
    """A stride's attention.

    Attributes:
        out: [B, H, T, Dv], dtype of the query.
        lse: [B, H, T], float32: log of the sum of all exponentiated scores, attention sinks' included; minus
            infinity for query rows that see nothing.
        mass: [S, B, H, T], float32: share of each segment.
        scores: [H, N], float32, for all N columns of all segments: exact weighted sums of probabilities; zero
            for columns that were not asked for. None without `Scoring`.
    """

    out: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor
    scores: torch.Tensor | None = None

    @property
    def attended(self) -> Attended:
        """As `segment_attention` returns it."""
        return Attended(self.out, self.mass, self.lse)


def ema_weights(num_rows: int, beta: float, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """What each query row of a stride adds to an exponential moving average that ends with the last row.

    Args:
        num_rows: q.
        beta: decay per row.
        device: of the result.

    Returns:
        [q], float32: (1 - beta) beta^(q-1-j), from float64.

    Raises:
        ValueError: a decay outside 0..1, or 1, which would make all weights 0.

    Source: cascading KV cache (Willette et al. 2024, arXiv:2406.17808).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"the decay of a score must be at least 0 and below 1, not {beta}")
    ages = torch.arange(num_rows - 1, -1, -1, dtype=torch.float64, device=device)
    return ((1 - beta) * beta**ages).float()


def reduce_heads(scores: torch.Tensor, num_sets: int, reduction: Reduction) -> torch.Tensor:
    """One score for all query heads that keep the same rows.

    Args:
        scores: [H, N].
        num_sets: how many sets of rows are kept: one per key head, or 1 for all heads together.
        reduction: the median is the lower one of two in the middle.

    Returns:
        [num_sets, N].

    Raises:
        ValueError: an unknown reduction, or query heads that cannot be shared out evenly.
    """
    if scores.shape[0] % num_sets:
        raise ValueError(f"{scores.shape[0]} query heads cannot be reduced to {num_sets}")
    grouped = scores.view(num_sets, -1, scores.shape[1])
    if reduction == "mean":
        return grouped.mean(1)
    if reduction == "max":
        return grouped.amax(1)
    if reduction == "median":
        return grouped.median(1).values
    raise ValueError(f"a reduction is mean, max or median, not {reduction!r}")

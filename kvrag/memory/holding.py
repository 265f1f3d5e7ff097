"""Which tokens a memory holds, and in how many layers and heads; costs as much as the memory is large."""

from __future__ import annotations

import torch

_DENSE = 4  # up to so many tokens for each slot, counting all of them is faster than sorting the slots


class Holding:
    """A memory's slots, counted by token.

    Neither time nor space depends on how many tokens the memory has ever taken.

    Attributes:
        seen: tokens that the memory has taken.
        groups: layers times heads; where all heads keep the same tokens, they count as one.
        tokens: [n], int64: numbers of those that are held at least once, ascending.
        counts: [n], int64: in how many groups each of them is.
    """

    def __init__(self, ids: torch.Tensor, seen: int) -> None:
        """Count.

        Args:
            ids: [L, K or 1, capacity], int64: number of the token in each slot; -1: empty.
            seen: tokens that the memory has taken.
        """
        self.seen, self.groups = seen, ids.shape[0] * ids.shape[1]
        held = ids[ids >= 0]
        if seen <= _DENSE * ids.numel():
            counts = torch.bincount(held, minlength=seen)
            self.tokens = counts.nonzero().flatten()
            self.counts = counts[self.tokens]
        else:
            self.tokens, self.counts = held.unique(return_counts=True)
        self._sums = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @property
    def num_tokens(self) -> int:
        """Tokens that at least one layer and head holds."""
        return len(self.tokens)

    @property
    def share(self) -> float:
        """Which share of all tokens an average layer and head holds; 1 if there are none."""
        return int(self._sums[-1]) / self.groups / self.seen if self.seen else 1.0

    def share_of(self, start: int, end: int) -> float:
        """Which share of the tokens `start`..`end`-1 an average layer and head holds."""
        first, last = torch.searchsorted(self.tokens, self.tokens.new_tensor([start, end])).tolist()
        return int(self._sums[last] - self._sums[first]) / self.groups / max(1, end - start)

    def last_below(self, share: float) -> int | None:
        """The youngest token that less than this share of layers and heads holds; None: there is none."""
        enough = self.tokens[self.counts >= share * self.groups].flip(0)
        expected = torch.arange(self.seen - 1, self.seen - 1 - len(enough), -1, device=enough.device)
        gaps = (enough != expected).nonzero()
        last = self.seen - 1 - (int(gaps[0]) if len(gaps) else len(enough))
        return last if last >= 0 and share > 0 else None

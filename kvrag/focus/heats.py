"""Heats: documents that do not fit into the window are compared group by group before they stand together.

Documents that share positions are harder to tell apart the more of them share one. In a heat a group stands
alone, as many as fit side by side; its best go on, until those left fit. The paper (CacheFocus, Lee et al.
2025, arXiv:2502.11101) says nothing of this; it is ours. Lengths in, places out: no rows, models or layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrag.errors import ConfigError
from kvrag.focus.scoring import Scorer

Span = Callable[[Sequence[int]], int]
"""Places of entrants -> positions that these take side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heats:
    """How documents beyond the window are compared before the question is read over the best of them.

    Attributes:
        size: share of the positions for documents that one heat fills at most.
        winners: of each heat, if that leaves fewer; None: as many as the pruning keeps in the end, so that no
            heat sends home one that belongs to them.
        fill: share of the positions for documents that those who come through fill at most.
        depth: layers that a heat reads; None: up to the last one that the scorer counts.
        scorer: what decides; None: the pruning's. A heat's scores are never compared with another's.
    """

    size: float = 1.0
    winners: int | None = None
    fill: float = 1.0
    depth: int | None = None
    scorer: Scorer | None = None

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        for name, share in (("size", self.size), ("fill", self.fill)):
            if not 0 < share <= 1:
                raise ConfigError(f"{name}={share}: expected a share of the positions, above 0 up to 1")
        for name, number in (("winners", self.winners), ("depth", self.depth)):
            if number is not None and number < 1:
                raise ConfigError(f"{name}={number}: expected at least 1, or None")

    def num_winners(self, entrants: int, keep: int, share: float) -> int:
        """How many of one heat go on: all that are wanted, but at most three quarters, or as many as fit.

        Args:
            entrants: of the heat.
            keep: wanted in the end, of all heats together.
            share: of all that are left, how many there is room for.

        >>> Heats().num_winners(20, keep=2, share=0.1), Heats().num_winners(20, keep=50, share=0.8)
        (2, 16)
        """
        most = max(1, 3 * entrants // 4, int(entrants * share))
        return min(most, keep if self.winners is None else self.winners)


def balanced(num: int, span: Span, room: int) -> list[range]:
    """Neighbours in groups, as few as possible, the largest of them as small as possible.

    Args:
        num: entrants, known by their places.
        span: see there; never less for more entrants.
        room: most positions of a group; an entrant that needs more is a group of its own.

    >>> widths = [10, 10, 10, 10, 10]
    >>> balanced(5, lambda places: sum(widths[i] for i in places), 40)
    [range(0, 3), range(3, 5)]
    """
    groups = _filled(num, span, room)
    low, high = 1, room  # the least room that needs no more groups
    while low < high:
        middle = (low + high) // 2
        if len(_filled(num, span, middle)) <= len(groups):
            high = middle
        else:
            low = middle + 1
    return _filled(num, span, high)


def _filled(num: int, span: Span, room: int) -> list[range]:
    """One group after the other, each taking what fits."""
    groups: list[range] = []
    first = 0
    for place in range(1, num + 1):
        if place == num or span(range(first, place + 1)) > room:
            groups.append(range(first, place))
            first = place
    return groups

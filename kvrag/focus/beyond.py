"""Where documents go that together have more rows than there are positions for them.

The paper (CacheFocus, Lee et al. 2025, arXiv:2502.11101) keeps documents longer than the positional range
apart by pruning, and does not say where they stand until enough are pruned. Everything here is therefore
ours, to be compared by measuring. Widths are in ranks, from the farthest from the query to the nearest;
offsets are counted from the first position behind the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

Strategy = Callable[[Sequence[int], int], tuple[int, ...]]
"""(positions that each document takes, positions there are) -> offset of each document.

Only asked when the widths together exceed the room and none of them does alone.
"""


def side_by_side(widths: Sequence[int]) -> tuple[int, ...]:
    """Offsets of documents that stand one behind the other, whatever room there is.

    >>> side_by_side([3, 5, 2])
    (0, 3, 8)
    """
    return tuple(accumulate(widths, initial=0))[:-1]


def share(widths: Sequence[int], room: int) -> tuple[int, ...]:
    """Neighbouring ranks share a place: rank r of M stands in place 1 + floor((r - 1)P / M).

    P is the largest number of places that fits, a place being as wide as its widest document. For documents
    of one width that is how many of them fit.

    >>> share([10, 10, 10, 10, 10], 20)
    (0, 0, 0, 10, 10)
    """
    return _in_places(lambda rank, places: rank * places // len(widths), widths, room)


def round_robin(widths: Sequence[int], room: int) -> tuple[int, ...]:
    """Ranks are dealt out in turn: rank r stands in place 1 + (r - 1) mod P; P and widths as in `share`.

    >>> round_robin([10, 10, 10, 10, 10], 20)
    (0, 10, 0, 10, 0)
    """
    return _in_places(lambda rank, places: rank % places, widths, room)


def interpolate(widths: Sequence[int], room: int) -> tuple[int, ...]:
    """Offsets side by side, scaled so that the last document ends with the room; rounded half up.

    Only where documents begin is scaled, not the distances within one. One that is longer than those behind
    it could then stick out; it begins earlier, and those before it no later than it does.

    >>> interpolate([10, 10, 10], 20)
    (0, 5, 10)
    """
    plain = side_by_side(widths)
    wanted, last = room - widths[-1], plain[-1]
    scaled = ((2 * offset * wanted + last) // (2 * last) for offset in plain)
    inside = [min(offset, room - width) for offset, width in zip(scaled, widths, strict=True)]
    return tuple(accumulate(reversed(inside), min))[::-1]


def _in_places(place: Callable[[int, int], int], widths: Sequence[int], room: int) -> tuple[int, ...]:
    """Offsets with as many places as fit; `place` maps (rank from 0, number of places) to a place from 0."""

    def places_of(count: int) -> list[int]:
        wide = [0] * count
        for rank, width in enumerate(widths):
            at = place(rank, count)
            wide[at] = max(wide[at], width)
        return wide

    # Every place is as wide as the narrowest document at least. Of the numbers that leaves, every one is
    # tried: with varied widths, more places can take less room than fewer do.
    narrowest = min(widths)
    most = min(len(widths), room // narrowest) if narrowest else len(widths)
    wide = next(w for w in map(places_of, range(most, 0, -1)) if sum(w) <= room)
    offsets = side_by_side(wide)
    return tuple(offsets[place(rank, len(wide))] for rank in range(len(widths)))


# By the name of the setting; the two that are missing need none, since what they place always fits.
STRATEGIES: dict[str, Strategy] = {"share": share, "round_robin": round_robin, "interpolate": interpolate}

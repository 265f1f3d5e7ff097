"""What happens in each sub-cache when tokens arrive: it depends on their numbers alone, never on scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LevelEvents:
    """One sub-cache over all arrivals of an update.

    What arrives is numbered 0..E-1. With the newest resident in front of it (if there is a resident) it
    falls into segments: a segment begins with what opens a slot, and goes on with what has a match there.
    A segment leaves one entry: the last of its best. Entries in order of age are the residents but the
    newest, then those of the segments; the oldest of them are pushed out and arrive at the next level.

    Attributes:
        newest: ring slot of the newest resident, -1 if there is none.
        firsts: [G], where each segment begins, in the sequence [newest resident, 0, 1, ..., E-1].
        leaving: [R], ring slots of the residents but the newest that are pushed out, oldest first.
        num_leaving: of the G segments' entries, how many are pushed out, too, behind the residents.
        kept: [G - kept_from], ring slots in which the other segments' entries lie in the end.
        kept_from: first segment of these (the newest resident's own is left out if nothing met it).
        stored: entries in the end.
        start: place of the oldest of them in the ring.
    """

    newest: int
    firsts: Ints
    leaving: Ints
    num_leaving: int
    kept: Ints
    kept_from: int
    stored: int
    start: int


def _level(
    level: int, width: int, stored: int, start: int, arrivals: Ints, accepted: NDArray[np.bool_]
) -> tuple[LevelEvents, Ints]:
    """The events of a level, and the arrivals at which something is pushed out of it."""
    opens = accepted.copy()
    if not stored:
        opens[:1] = True  # nobody to have a match with
    opening = np.flatnonzero(opens)
    total = stored + len(opening)
    pushed = max(0, total - width)
    has_newest = stored > 0
    before = stored - 1 if has_newest else 0  # residents that take part in no segment
    firsts = np.concatenate([[0], opening + 1]) if has_newest else opening
    is_lone = has_newest and (len(opens) == 0 or bool(opens[0]))
    num_leaving = max(0, pushed - before)
    kept_from = max(num_leaving, int(is_lone))

    def slots(first: int, end: int) -> Ints:
        """Ring slots of the entries first..end-1 in order of age."""
        return level * width + (start + np.arange(first, end, dtype=np.int64)) % width

    events = LevelEvents(
        newest=int(slots(before, before + 1)[0]) if has_newest else -1,
        firsts=firsts.astype(np.int64),
        leaving=slots(0, min(pushed, before)),
        num_leaving=num_leaving,
        kept=slots(before + kept_from, before + len(firsts)),
        kept_from=kept_from,
        stored=min(width, total),
        start=(start + pushed) % width,
    )
    return events, arrivals[opening[len(opening) - pushed :]]


def cascade_events(
    stored: Sequence[int],
    start: Sequence[int],
    arrived: int,
    num_new: int,
    *,
    periods: Sequence[int],
    width: int,
    eager: bool = True,
) -> list[LevelEvents]:
    """The events of all sub-caches, youngest first; see `cascade_update` for the arguments."""
    capacity = width * len(periods)
    arrivals = np.arange(arrived, arrived + num_new, dtype=np.int64)
    levels = []
    for level, period in enumerate(periods):
        accepted = arrivals % period == 0
        if eager:
            accepted |= arrivals <= capacity
        events, arrivals = _level(level, width, stored[level], start[level], arrivals, accepted)
        levels.append(events)
    return levels


def first_competing(stored: Sequence[int]) -> int:
    """Whose scores still matter: the entries from this one on, counted from the oldest (sinks left out).

    What leaves the last sub-cache is lost whatever its score, so in there only the newest entry can have
    another match.

    Args:
        stored: [C], how many entries each sub-cache has, youngest sub-cache first.
    """
    return max(0, stored[-1] - 1)


def rounds(firsts: Ints, num_items: int) -> list[tuple[Ints, Ints]]:
    """A knock-out tournament in every segment at once.

    Args:
        firsts: [G], where each segment begins; the first begins at 0.
        num_items: of all segments.

    Returns:
        For each round, the earlier and the later one of every match, as places among those who are left;
        who has nobody to play against plays against himself. After the last round G are left.
    """
    found = []
    lengths = np.diff(np.append(firsts, num_items))
    while len(lengths) < num_items:
        matches = (lengths + 1) // 2
        ends = np.cumsum(matches)
        segment = np.repeat(np.arange(len(lengths)), matches)
        earlier = firsts[segment] + 2 * (np.arange(ends[-1]) - (ends - matches)[segment])
        later = np.minimum(earlier + 1, (firsts + lengths - 1)[segment])
        found.append((earlier, later))
        firsts, lengths, num_items = ends - matches, matches, int(ends[-1])
    return found

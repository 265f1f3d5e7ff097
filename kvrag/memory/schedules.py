"""How often each sub-cache of a cascade accepts what the one before it pushes out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import lcm

from kvrag.errors import ConfigError
from kvrag.memory.slots import check_whole


def _ones_first(share: float) -> Callable[[int, int], int]:
    return lambda level, levels: 1 if level < share * levels else 2**level


SCHEDULES: dict[str, Callable[[int, int], int]] = {
    "pow2": lambda level, _: 2**level,
    "pow3": lambda level, _: 3**level,
    "pow4": lambda level, _: 4**level,
    "iplus1": lambda level, _: level + 1,
    "1-then-2": lambda level, _: 2 if level else 1,
    "pow2-1": lambda level, levels: 2**level if level == levels - 1 else 1,
    "pow2-1-4": _ones_first(3 / 4),
    "pow2-2-4": _ones_first(2 / 4),
    "pow2-3-4": _ones_first(1 / 4),
}
"""Period of a level, counted from 0, among so many levels. The names are those of the paper's code."""


def periods_of(schedule: str | tuple[int, ...], sub_caches: int) -> tuple[int, ...]:
    """The acceptance period of every sub-cache, youngest first.

    Raises:
        ConfigError: an unknown name, or another number of periods than of sub-caches.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}, or periods")
        return tuple(SCHEDULES[schedule](level, sub_caches) for level in range(sub_caches))
    for period in schedule:
        check_whole("a period of the schedule", period, 1)
    if len(schedule) != sub_caches:
        raise ConfigError(f"schedule has {len(schedule)} periods; expected {sub_caches}, one per sub-cache")
    return tuple(schedule)


def effective(periods: tuple[int, ...]) -> tuple[int, ...]:
    """Arrivals per arrival that each level really accepts: all levels above must accept it, too."""
    return tuple(accumulate(periods, lcm))

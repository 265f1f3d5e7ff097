"""Which entries go first when a tier is full: a number for each, the lowest goes.

A policy is one function of an entry's use. The memory tier keeps the numbers in a heap, the disk's index in a
column, so that eviction is the same rule in every tier and the choice can be replayed on a recorded trace
(`benchmarks/eviction.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrag.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Use:
    """What is known of an entry when its number is made: when it is put, and at each hit.

    Attributes:
        hits: loads so far, the put itself counting as one.
        num_bytes: what the entry takes of the tier's budget; at least 1.
        cost_seconds: what reading the text anew would take; 0 if unknown.
        clock: number of this use among all of the tier; larger is later. No wall clock: it may jump.
        floor: number of the entry that was evicted last, 0 before the first. Policies that add it age: what
            is not used any more is overtaken by newcomers.
    """

    hits: int
    num_bytes: int
    cost_seconds: float
    clock: int
    floor: float


def lru(use: Use) -> float:
    """Least recently used: the time of the last use alone."""
    return float(use.clock)


def lfu_da(use: Use) -> float:
    """Least frequently used with dynamic aging (Arlitt et al. 2000, HPL-98-173)."""
    return use.floor + use.hits


def gdsf(use: Use) -> float:
    """Greedy dual size frequency (Cherkasova 1998, HPL-98-69): hits times cost per byte, and aging.

    With unknown costs the bytes stand for them: reading a text anew costs about as much as it is long.
    """
    cost = use.cost_seconds if use.cost_seconds > 0 else float(use.num_bytes)
    return use.floor + use.hits * cost / use.num_bytes


Priority = Callable[[Use], float]
EVICTION: dict[str, Priority] = {"gdsf": gdsf, "lfu-da": lfu_da, "lru": lru}


def eviction_named(name: str) -> Priority:
    """A policy by name.

    Raises:
        ConfigError: no policy has this name.
    """
    if name not in EVICTION:
        raise ConfigError(f"eviction={name!r}: expected one of {', '.join(sorted(EVICTION))}")
    return EVICTION[name]

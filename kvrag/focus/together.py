"""Chunks of one source that share their fate: kept together or dropped together.

A chunk that only says whom its source is about is looked at less than the one with the fact, and the fact is
lost on whoever does not see it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, get_args

from kvrag.errors import ConfigError

Together = Literal["sum", "max"]
"""What a source's score is made of those of its chunks."""


def check(together: str | None) -> None:
    """Refuse what is not known."""
    if together is not None and together not in get_args(Together):
        raise ConfigError(f"together={together!r}: expected one of {', '.join(get_args(Together))}, or None")


def groups_of(sources: Sequence[Hashable | None], together: Together | None) -> list[list[int]]:
    """Places of the chunks of each source, in order of its first one.

    Args:
        sources: of each chunk; None: a source of its own.
        together: None: every chunk is.

    >>> groups_of(["a", None, "a", None], "sum"), groups_of(["a", "a"], None)
    ([[0, 2], [1], [3]], [[0], [1]])
    """
    found: dict[object, list[int]] = {}
    for i, source in enumerate(sources):
        alone = source is None or together is None
        found.setdefault(i if alone else (source,), []).append(i)
    return list(found.values())


def scores_of(
    scores: Sequence[float], groups: Sequence[Sequence[int]], together: Together | None
) -> list[float]:
    """Score of each group.

    >>> scores_of([1.0, 2.0, 4.0], [[0, 2], [1]], "sum"), scores_of([1.0, 2.0, 4.0], [[0, 2], [1]], "max")
    ([5.0, 2.0], [4.0, 2.0])
    """
    joined = max if together == "max" else sum
    return [joined(scores[i] for i in group) for group in groups]

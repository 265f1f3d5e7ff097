"""The update of a cascade of sub-caches: which tokens of a stride stay, and which they push out.

Only numbers and scores are looked at; whoever holds the rows moves those that are named.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels._backend import backend
from kvrag_kernels.cascade_update.events import LevelEvents, cascade_events, first_competing, rounds
from kvrag_kernels.cascade_update.reference import cascade_update_reference
from kvrag_kernels.cascade_update.types import CascadeUpdate
from kvrag_kernels.cascade_update.vectorised import cascade_update_vectorised

__all__ = [
    "CascadeUpdate",
    "LevelEvents",
    "cascade_events",
    "cascade_update",
    "cascade_update_reference",
    "cascade_update_vectorised",
    "first_competing",
    "rounds",
]


def cascade_update(
    scores: torch.Tensor,
    fresh: torch.Tensor,
    stored: Sequence[int],
    start: Sequence[int],
    arrived: int,
    *,
    periods: Sequence[int],
    width: int,
    eager: bool = True,
) -> CascadeUpdate:
    """Insert new tokens, in order, into C sub-caches of W slots each; the youngest sub-cache is the first.

    A token that arrives as number u is accepted by sub-cache i if u is a multiple of `periods[i]`, or, if
    `eager`, as long as u <= C * W. Accepted, it takes a free slot, or that of the oldest entry, which moves
    on to the next sub-cache under the same u. Not accepted, it has a match with the newest entry: the one
    with the higher score stays, the arriving one if they are equal. An empty sub-cache accepts always.

    Args:
        scores: [L, K, C * W], any float dtype, not NaN: of the entries; what empty slots have is not looked
            at. Sub-cache i owns the slots i * W to (i + 1) * W - 1.
        fresh: [L, K, q], same dtype: of the new tokens; any q.
        stored: [C], how many entries each sub-cache has.
        start: [C], place of its oldest entry within its slots; 0 unless it is full.
        arrived: u of the first new token: how many were inserted before.
        periods: [C].
        width: W.
        eager: fill all sub-caches before anything is chosen.

    Raises:
        ValueError: sizes that do not fit each other, or a ring that cannot be.

    Source: Cascading KV Cache (Willette et al. 2024, arXiv:2406.17808), with floor-mod rings.
    """
    _check(scores, fresh, stored, start, arrived, periods, width)
    if backend(scores.device) == "triton":
        from kvrag_kernels.cascade_update.launch import cascade_update_triton  # noqa: PLC0415 - needs triton

        return cascade_update_triton(
            scores, fresh, stored, start, arrived, periods=periods, width=width, eager=eager
        )
    return cascade_update_vectorised(
        scores, fresh, stored, start, arrived, periods=periods, width=width, eager=eager
    )


def _check(
    scores: torch.Tensor,
    fresh: torch.Tensor,
    stored: Sequence[int],
    start: Sequence[int],
    arrived: int,
    periods: Sequence[int],
    width: int,
) -> None:
    if width < 1 or not periods or min(periods) < 1:
        raise ValueError(f"a cascade needs slots and periods of at least 1, not {width} and {list(periods)}")
    if scores.dim() != 3 or scores.shape[-1] != len(periods) * width:
        raise ValueError(f"scores must be [L, K, {len(periods) * width}], not {list(scores.shape)}")
    if fresh.dim() != 3 or fresh.shape[:2] != scores.shape[:2] or fresh.dtype != scores.dtype:
        raise ValueError(
            f"fresh must be {[*scores.shape[:2]]} + [q] in {scores.dtype}, "
            f"not {list(fresh.shape)} in {fresh.dtype}"
        )
    if arrived < 0 or not len(stored) == len(start) == len(periods):
        raise ValueError(f"{len(periods)} sub-caches need as many stored and start, and arrivals from 0 on")
    for count, first in zip(stored, start, strict=True):
        if not (0 <= count <= width and 0 <= first < width and (first == 0 or count == width)):
            raise ValueError(f"no ring of {width} slots has {count} entries from place {first} on")

"""The definition of the cascade's insertion: token by token, level by level, head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvrag_kernels.cascade_update.types import CascadeUpdate


class _Rings:
    """The sub-caches of one head: where each slot's entry comes from, and its score."""

    def __init__(self, scores: list[float], stored: Sequence[int], start: Sequence[int], width: int) -> None:
        self.sources, self.scores, self.width = list(range(len(scores))), scores, width
        self.stored, self.start = list(stored), list(start)
        self.touched: set[int] = set()

    def _put(self, level: int, place: int, source: int, score: float) -> tuple[int, float]:
        slot = level * self.width + place
        before = self.sources[slot], self.scores[slot]
        self.sources[slot], self.scores[slot] = source, score
        self.touched.add(slot)
        return before

    def _append(self, level: int, source: int, score: float) -> None:
        self._put(level, self.stored[level], source, score)
        self.stored[level] += 1

    def _replace_oldest(self, level: int, source: int, score: float) -> tuple[int, float]:
        oldest = self._put(level, self.start[level], source, score)
        self.start[level] = (self.start[level] + 1) % self.width
        return oldest

    def _match(self, level: int, source: int, score: float) -> None:
        place = (self.start[level] - 1) % self.stored[level]
        newest = self._put(level, place, source, score)
        if not score >= newest[1]:
            self._put(level, place, *newest)

    def insert(self, source: int, score: float, accepts: Iterator[bool]) -> None:
        """One token; `accepts` says level by level whether this arrival is accepted there."""
        for level, accepted in enumerate(accepts):
            if not accepted and self.stored[level]:
                return self._match(level, source, score)
            if self.stored[level] < self.width:
                return self._append(level, source, score)
            source, score = self._replace_oldest(level, source, score)
        return None


def cascade_update_reference(
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
    """Insert new tokens one after the other; see `cascade_update` for the arguments."""
    layers, heads, capacity = scores.shape
    sources = []
    rings = _Rings([], stored, start, width)
    old, new = scores.flatten(0, 1).tolist(), fresh.flatten(0, 1).tolist()
    for mine, theirs in zip(old, new, strict=True):
        rings = _Rings(mine, stored, start, width)
        for row, score in enumerate(theirs):
            arrival = arrived + row
            is_free = eager and arrival <= capacity
            rings.insert(capacity + row, score, (is_free or arrival % n == 0 for n in periods))
        sources.append([rings.sources[slot] for slot in sorted(rings.touched)])
    slots = torch.tensor(sorted(rings.touched), dtype=torch.int64, device=scores.device)
    found = torch.tensor(sources, dtype=torch.int64, device=scores.device)
    return CascadeUpdate(
        slots, found.reshape(layers, heads, len(slots)), tuple(rings.stored), tuple(rings.start)
    )

"""Sub-caches that get sparser with age, each keeping what was looked at most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch

from kvrag.errors import ConfigError
from kvrag.memory.base import Moves, Reduction, Run, Seen, Watching
from kvrag.memory.schedules import periods_of
from kvrag.memory.slots import (
    SlotState,
    check_budget,
    check_sizes,
    check_whole,
    first_slots,
    joined,
    move,
    ring,
    sinks_beside,
)
from kvrag_kernels.cascade_update import cascade_update


@dataclass(frozen=True, slots=True)
class Cascade:
    """A window, and behind it windows that thin out what leaves the one before, by attention.

    Each of the C sub-caches has (budget - sinks) // C slots; with the schedule "pow2" the whole reaches back
    about (2^C - 1) times as many tokens.

    Attributes:
        budget: tokens per layer and head, sinks included.
        sub_caches: C; with 1 this is the window.
        sinks: first tokens, which stay.
        schedule: which arrivals a sub-cache accepts: a name (`kvrag.memory.schedules`), or a period for each.
        beta: decay of a score per token; 1 - ln(2) / n for a half-life of n tokens.
        reduction: of attention over the query heads that share a key head.
        homogeneous: over all heads of a layer instead: they then keep the same tokens.
        eager: fill all sub-caches before anything is chosen.

    Raises:
        ConfigError: a setting that cannot work; the message says which.

    Source: Cascading KV Cache (Willette et al. 2024, arXiv:2406.17808) as described: scores in float32,
    an exact moving average over the columns they belong to, any sizes.
    """

    budget: int
    sub_caches: int = 4
    sinks: int = 4
    schedule: str | tuple[int, ...] = "pow2"
    beta: float = 0.9999
    reduction: Reduction = "max"
    homogeneous: bool = False
    eager: bool = True
    name: ClassVar[str] = "cascade"

    def __post_init__(self) -> None:
        check_whole("sub_caches", self.sub_caches, 1)
        check_budget(self.budget, self.sinks, self.sub_caches, f"{self.sub_caches} sub-caches and ")
        if not 0 < self.beta <= 1:
            raise ConfigError(f"beta is {self.beta}; expected a decay above 0 and up to 1")
        if self.reduction not in get_args(Reduction):
            raise ConfigError(f"reduction is {self.reduction!r}; expected one of {get_args(Reduction)}")
        periods_of(self.schedule, self.sub_caches)

    @property
    def periods(self) -> tuple[int, ...]:
        """Of every sub-cache, youngest first."""
        return periods_of(self.schedule, self.sub_caches)

    @property
    def watching(self) -> Watching | None:
        """How attention becomes scores; None if nothing is ever chosen."""
        if max(self.periods) == 1:
            return None
        return Watching(self.beta, self.reduction, self.homogeneous)

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> CascadeState:
        """An empty memory; behind pinned tokens the sub-caches have the sinks' room, too."""
        check_sizes(num_layers, num_kv_heads, pinned)
        own = replace(self, sinks=sinks_beside(self.sinks, pinned))
        return CascadeState(own, num_layers, num_kv_heads, device)


class CascadeState(SlotState):
    """Sinks in the first slots, then the rings, youngest first."""

    def __init__(
        self, policy: Cascade, num_layers: int, num_kv_heads: int, device: torch.device | None
    ) -> None:
        self._width = (policy.budget - policy.sinks) // policy.sub_caches
        self._watching, self._policy, self._periods = policy.watching, policy, policy.periods
        heads = num_kv_heads if self._watching and not policy.homogeneous else 1
        capacity = policy.sinks + self._width * policy.sub_caches
        super().__init__(policy, num_layers, heads, capacity, device)
        self._scores = torch.zeros(self._ids.shape, device=device)
        self.stored: tuple[int, ...] = (0,) * policy.sub_caches
        self.start: tuple[int, ...] = (0,) * policy.sub_caches

    @property
    def watching(self) -> Watching | None:
        """How attention becomes scores; None if nothing is ever chosen."""
        return self._watching

    @property
    def scores(self) -> torch.Tensor:
        """[L, K or 1, capacity], float32: moving average of the attention to each slot; not a copy."""
        return self._scores

    @property
    def runs(self) -> tuple[Run, ...]:
        """Sinks, then the rings from the last to the first."""
        sinks, width = self._policy.sinks, self._width
        pieces = [(0, min(self.seen, sinks))]
        for level in reversed(range(len(self.stored))):
            pieces += ring(sinks + level * width, width, self.stored[level], self.start[level])
        return joined(pieces)

    def _weighed(self, scores: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What matches compare: [L, K or 1, capacity] and [L, K or 1, q]."""
        return scores, fresh

    def _insert(self, num_new: int, seen: Seen | None) -> Moves:
        sinks, device = self._policy.sinks, self._ids.device
        fresh = self._attended(num_new, seen)
        num_sinks = first_slots(sinks, self.seen, num_new)
        old, new = self._weighed(self._scores, fresh)
        update = cascade_update(
            old[..., sinks:],
            new[..., num_sinks:],
            self.stored,
            self.start,
            max(0, self.seen - sinks),
            periods=self._periods,
            width=self._width,
            eager=self._policy.eager,
        )
        # The op counts slots from behind the sinks, and rows from behind the new sinks.
        is_row = update.sources >= self.capacity - sinks
        sources = update.sources + torch.where(is_row, sinks + num_sinks, sinks)
        first = torch.arange(num_sinks, device=device)
        slots = torch.cat([self.seen + first, sinks + update.slots])
        to_sinks = (self.capacity + first).expand(*sources.shape[:2], -1)
        moves = Moves(slots, torch.cat([to_sinks, sources], dim=-1) if num_sinks else sources, self.capacity)
        self.stored, self.start = update.stored, update.start
        move(moves, self._scores, fresh)
        return moves

    def _attended(self, num_new: int, seen: Seen | None) -> torch.Tensor:
        """Bring the scores up to date; the first scores of the new tokens, [L, K or 1, q]."""
        if self._watching is None or seen is None:
            return self._scores.new_zeros(*self._scores.shape[:2], num_new)
        decay = self._watching.beta**num_new
        torch.add(seen.slots.to(self._scores), self._scores, alpha=decay, out=self._scores)  # one pass
        return seen.fresh.to(self._scores)

    def _numbers(self) -> list[int]:
        return [*self.stored, *self.start]

    def _renumber(self, numbers: list[int]) -> None:
        levels = len(self.stored)
        self.stored, self.start = tuple(numbers[:levels]), tuple(numbers[levels:])

    def _tensors(self) -> dict[str, torch.Tensor]:
        return super()._tensors() | {"scores": self._scores}

"""What was surprising stays longest: whole messages, the same in all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvrag.errors import ConfigError
from kvrag.memory.base import Moves, Run, Seen, Watching
from kvrag.memory.slots import (
    SlotState,
    check_budget,
    check_sizes,
    first_slots,
    joined,
    move,
    ring,
    sinks_beside,
)

_LEAST = 1e-30  # a surprise of 0 has no logarithm


@dataclass(frozen=True, slots=True)
class Salient:
    """Sinks, a window, and between them those older tokens that the model expected least.

    A token's worth is the surprise of its message, halved with every `half_life` budgets of tokens that come
    after it; what leaves the window stays as long as it is worth more than something else. Attention tells
    what was needed so far; surprise tells, before anything is asked, what could not be made up again.

    Attributes:
        budget: tokens per layer and head, sinks included.
        recent: share of it, without sinks, that the window has.
        half_life: in budgets; short where everything told is news, long where little is.
        sinks: first tokens, which stay.
        homogeneous: all heads keep the same tokens, as surprise does not differ between them; otherwise
            `Seen.fresh` says for each head what a token is worth.

    Raises:
        ConfigError: a setting that cannot work; the message says which.

    Source: this package; surprise as what makes a memory is EM-LLM's (Fountas et al. 2024, arXiv:2407.09450),
    which cuts and retrieves by it but drops nothing.
    """

    budget: int
    recent: float = 0.1
    half_life: float = 3.0
    sinks: int = 4
    homogeneous: bool = True
    name: ClassVar[str] = "salient"

    def __post_init__(self) -> None:
        check_budget(self.budget, self.sinks)
        if not 0 <= self.recent <= 1:
            raise ConfigError(f"recent is {self.recent}; expected a share from 0 to 1")
        if not self.half_life > 0:
            raise ConfigError(f"half_life is {self.half_life}; expected a number of budgets above 0")

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> SalientState:
        """An empty memory."""
        check_sizes(num_layers, num_kv_heads, pinned)
        own = replace(self, sinks=sinks_beside(self.sinks, pinned))
        return SalientState(own, num_layers, num_kv_heads, device)


class SalientState(SlotState):
    """Sinks in the first slots, then what is worth most by age, then the window as a ring."""

    def __init__(
        self, policy: Salient, num_layers: int, num_kv_heads: int, device: torch.device | None
    ) -> None:
        heads = 1 if policy.homogeneous else num_kv_heads
        super().__init__(policy, num_layers, heads, policy.budget, device)
        room = policy.budget - policy.sinks
        self._sinks, self._width = policy.sinks, min(room, max(1, round(policy.recent * room)))
        self._pool = room - self._width
        self._half_life = policy.half_life * policy.budget
        self._watching = Watching(1.0, "mean", policy.homogeneous, surprise=True)
        # log2 of the surprise plus number / half-life: who is worth more never changes.
        self._worth = torch.zeros(self._ids.shape, dtype=torch.float64, device=device)

    @property
    def watching(self) -> Watching:
        """Surprise."""
        return self._watching

    @property
    def _arrived(self) -> int:
        return max(0, self.seen - self._sinks)

    @property
    def _stored(self) -> int:
        """Entries between sinks and window."""
        return min(self._pool, max(0, self._arrived - self._width))

    @property
    def runs(self) -> tuple[Run, ...]:
        """Sinks, what is worth most, the window."""
        arrived, width = self._arrived, self._width
        start = arrived % width if arrived > width else 0
        window = ring(self._sinks + self._pool, width, min(arrived, width), start)
        return joined([(0, min(self.seen, self._sinks)), (self._sinks, self._stored), *window])

    def _insert(self, num_new: int, seen: Seen | None) -> Moves:
        assert seen is not None
        numbers = torch.arange(self.seen, self.seen + num_new, device=self._ids.device)
        fresh = seen.fresh.double().clamp_min(_LEAST).log2() + numbers / self._half_life
        num_sinks = first_slots(self._sinks, self.seen, num_new)
        before, after = self._arrived, self._arrived + num_new - num_sinks
        row = self.capacity + num_sinks - before  # source of an arrival of this stride is row + its number

        def source(arrival: int) -> int:
            if arrival >= before:
                return row + arrival
            return self._sinks + self._pool + arrival % self._width

        leaving = range(max(0, before - self._width), max(0, after - self._width))
        coming = range(max(before, after - self._width), after)
        pool = self._chosen([*range(self._sinks, self._sinks + self._stored), *map(source, leaving)], fresh)
        first = torch.arange(num_sinks)
        slots = [
            self.seen + first,
            self._sinks + torch.arange(pool.shape[-1]),
            self._sinks + self._pool + torch.arange(coming.start, coming.stop) % self._width,
        ]
        sources = [
            self._wide(self.capacity + first),
            pool,
            self._wide(row + torch.arange(coming.start, coming.stop)),
        ]
        moves = self._changed(torch.cat(slots).to(pool.device), torch.cat(sources, -1).long())
        move(moves, self._worth, fresh)
        return moves

    def _wide(self, sources: torch.Tensor) -> torch.Tensor:
        return sources.to(self._ids.device).expand(*self._ids.shape[:2], -1)

    def _chosen(self, candidates: Sequence[int], fresh: torch.Tensor) -> torch.Tensor:
        """[L, K or 1, n]: those of the candidates, oldest first, that are worth most; ties: the younger."""
        places = torch.tensor(candidates, dtype=torch.long, device=self._ids.device)
        if len(candidates) <= self._pool:
            return self._wide(places)
        worth = torch.cat([self._worth, fresh.expand(*self._worth.shape[:2], -1)], -1)[..., places]
        order = worth.flip(-1).sort(descending=True, stable=True).indices[..., : self._pool]
        return places[(len(candidates) - 1 - order).sort().values]

    def _changed(self, slots: torch.Tensor, sources: torch.Tensor) -> Moves:
        """Without entries that stay where they are in all layers and heads."""
        is_changed = (sources != slots).any(0).any(0)
        return Moves(slots[is_changed], sources[..., is_changed], self.capacity)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return super()._tensors() | {"worth": self._worth}

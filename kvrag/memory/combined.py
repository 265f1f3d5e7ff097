"""A ladder over a cascade: what was looked at most stays, and each layer leans towards other tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvrag.errors import ConfigError
from kvrag.memory.base import Moves, Seen
from kvrag.memory.cascade import Cascade, CascadeState
from kvrag.memory.schedules import effective
from kvrag.memory.slots import check_sizes, move, sinks_beside

_MOST_WEIGHT = 1e30  # far from where float32 ends


@dataclass(frozen=True, slots=True)
class LadderCascade(Cascade):
    """A cascade whose matches are weighted, in every layer in favour of other tokens.

    With P_i the number of arrivals per entry of sub-cache i, layer l prefers tokens whose number is l modulo
    P_i: one of the P_i tokens of every block. A match compares score * (1 + bonus)^depth, where depth is for
    how many different P_i a token is preferred. A bonus of 0 is the cascade. A huge one is a ladder: layer l
    keeps, of each block, the token of its own residue, and P_i neighbouring layers together keep all of them.

    Attributes:
        bonus: how much a score is raised by each period that the token agrees in.

    Raises:
        ConfigError: a setting that cannot work; the message says which.

    Source: this package. The two halves are Cascading KV Cache (arXiv:2406.17808), whose layers all lose what
    nobody has looked at yet, and LaCache (Shi et al. 2025, arXiv:2507.14204), whose layers keep different
    tokens and look at no scores.
    """

    bonus: float = 1.0
    name: ClassVar[str] = "combined"

    def __post_init__(self) -> None:
        Cascade.__post_init__(self)
        depth = len(self.residues)
        if not (self.bonus >= 0 and (1 + self.bonus) ** depth <= _MOST_WEIGHT):
            most = _MOST_WEIGHT ** (1 / max(1, depth)) - 1
            raise ConfigError(f"bonus is {self.bonus}; expected a number from 0 to {most:.3g}")

    @property
    def residues(self) -> tuple[int, ...]:
        """Different periods above 1 that numbers of layers and tokens are compared in."""
        return tuple(sorted({period for period in effective(self.periods) if period > 1}))

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> LadderCascadeState:
        """An empty memory; behind pinned tokens the sub-caches have the sinks' room, too."""
        check_sizes(num_layers, num_kv_heads, pinned)
        own = replace(self, sinks=sinks_beside(self.sinks, pinned))
        return LadderCascadeState(own, num_layers, num_kv_heads, device)


class LadderCascadeState(CascadeState):
    """A cascade's state that knows how much each layer wants the token in each slot."""

    def __init__(
        self, policy: LadderCascade, num_layers: int, num_kv_heads: int, device: torch.device | None
    ) -> None:
        super().__init__(policy, num_layers, num_kv_heads, device)
        self._bonus, self._residues = policy.bonus, policy.residues
        self._weights = torch.ones_like(self._scores)

    def _wanted(self, ids: torch.Tensor) -> torch.Tensor:
        """What scores are multiplied by, [L, K or 1, n] for numbers of tokens that expand to that."""
        arrivals = ids.long() - self._policy.sinks
        layers = torch.arange(self._ids.shape[0], device=ids.device)[:, None, None]
        depth = torch.zeros(torch.broadcast_shapes(ids.shape, layers.shape), device=ids.device)
        for period in self._residues:
            depth += (arrivals - layers) % period == 0
        return (1 + self._bonus) ** depth

    def _wanted_next(self, num_new: int) -> torch.Tensor:
        return self._wanted(torch.arange(self.seen, self.seen + num_new, device=self._ids.device))

    def _weighed(self, scores: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scores * self._weights, fresh * self._wanted_next(fresh.shape[-1])

    def _insert(self, num_new: int, seen: Seen | None) -> Moves:
        moves = super()._insert(num_new, seen)
        move(moves, self._weights, self._wanted_next(num_new))
        return moves

    def _renumber(self, numbers: list[int]) -> None:
        super()._renumber(numbers)
        self._weights = self._wanted(self._ids)

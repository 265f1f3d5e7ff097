"""Nothing is ever forgotten: what all other policies are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvrag.errors import ConfigError
from kvrag.memory.base import Moves, Run, Seen, Watching
from kvrag.memory.slots import check_sizes, check_whole, fingerprint, joined


@dataclass(frozen=True, slots=True)
class Full:
    """Every token stays, and the memory grows."""

    name: ClassVar[str] = "full"
    budget: ClassVar[None] = None

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> FullState:
        """An empty memory; all heads keep the same tokens."""
        check_sizes(num_layers, num_kv_heads, pinned)
        return FullState(num_layers, device)


class FullState:
    """As many slots as tokens, in their order."""

    watching: Watching | None = None

    def __init__(self, num_layers: int, device: torch.device | None) -> None:
        self._layers, self._device = num_layers, device
        self.seen = 0

    @property
    def capacity(self) -> int:
        """Slots: it grows with every token."""
        return self.seen

    @property
    def runs(self) -> tuple[Run, ...]:
        """One, of everything."""
        return joined([(0, self.seen)])

    @property
    def ids(self) -> torch.Tensor:
        """[L, 1, capacity], int64."""
        return torch.arange(self.seen, device=self._device).expand(self._layers, 1, -1)

    def take(self, num_new: int, seen: Seen | None = None) -> Moves:
        """Insert the next tokens behind all others."""
        check_whole("num_new", num_new, 0)
        before, self.seen = self.seen, self.seen + num_new
        slots = torch.arange(before, self.seen, device=self._device)
        return Moves(slots, slots.expand(self._layers, 1, -1), before)

    def state(self) -> dict[str, torch.Tensor]:
        """How many tokens there are."""
        return {"numbers": torch.tensor([fingerprint(f"full {self._layers}"), self.seen])}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Become what `state` gave.

        Raises:
            ConfigError: it is of another policy, or of another number of layers.
        """
        numbers = state["numbers"].tolist() if set(state) == {"numbers"} else []
        if len(numbers) != 2 or numbers[0] != fingerprint(f"full {self._layers}"):
            raise ConfigError(f"this state is of another memory than a full one of {self._layers} layers")
        self.seen = numbers[1]

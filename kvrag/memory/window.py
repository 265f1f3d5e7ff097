"""The first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvrag.memory.base import Moves, Run, Seen
from kvrag.memory.slots import (
    SlotState,
    check_budget,
    check_sizes,
    first_slots,
    joined,
    ring,
    sinks_beside,
)


@dataclass(frozen=True, slots=True)
class Window:
    """Attention sinks, and a window that slides.

    Attributes:
        budget: tokens per layer, sinks included.
        sinks: first tokens, which stay.

    Raises:
        ConfigError: no room beside the sinks.

    Source: StreamingLLM (Xiao et al. 2023, arXiv:2309.17453).
    """

    budget: int
    sinks: int = 4
    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        check_budget(self.budget, self.sinks)

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> WindowState:
        """An empty memory; all heads keep the same tokens. Behind pinned tokens the window is the wider."""
        check_sizes(num_layers, num_kv_heads, pinned)
        return WindowState(self, num_layers, sinks_beside(self.sinks, pinned), device)


class WindowState(SlotState):
    """Sinks in the first slots, a ring in the others."""

    def __init__(self, policy: Window, num_layers: int, sinks: int, device: torch.device | None) -> None:
        super().__init__((policy, sinks), num_layers, 1, policy.budget, device)
        self._sinks, self._width = sinks, policy.budget - sinks

    @property
    def runs(self) -> tuple[Run, ...]:
        """Sinks, then the ring."""
        arrived = max(0, self.seen - self._sinks)
        start = arrived % self._width if arrived > self._width else 0
        stored = min(arrived, self._width)
        return joined([(0, min(self.seen, self._sinks)), *ring(self._sinks, self._width, stored, start)])

    def _insert(self, num_new: int, seen: Seen | None) -> Moves:
        num_sinks = first_slots(self._sinks, self.seen, num_new)
        first = max(num_sinks, num_new - self._width)  # older ones come and go within the stride
        rows = torch.cat([torch.arange(num_sinks), torch.arange(first, num_new)])
        tokens = self.seen + rows
        slots = torch.where(tokens < self._sinks, tokens, self._sinks + (tokens - self._sinks) % self._width)
        slots, order = slots.sort()
        device = self._ids.device
        sources = (self.capacity + rows[order]).to(device).expand(self._ids.shape[0], 1, -1)
        return Moves(slots.to(device), sources, self.capacity)

"""The interface between a policy, which decides what stays, and the rows of a memory, which it never sees.

A memory is a number of slots in each layer and head. A policy says which slot gets which entry (`Moves`) and
at which places of the sequence runs of slots appear (`Run`); both are edits of a segment table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Reduction = Literal["mean", "max", "median"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots whose entries are neighbours in the sequence, too.

    Attributes:
        slot: first slot.
        length: how many slots.
        rank: place of the first one's entry among all entries, oldest first, counted from 0.
    """

    slot: int
    length: int
    rank: int


@dataclass(frozen=True, slots=True)
class Moves:
    """Which entries change their slot when a stride comes in; all others stay as they are.

    Attributes:
        slots: [m], int64: slots that are written, the same in all layers and heads.
        sources: [L, K or 1, m], int64: what is written there: a slot of before (below `num_before`), or
            `num_before` plus a row of the stride.
        num_before: slots there were.
    """

    slots: torch.Tensor
    sources: torch.Tensor
    num_before: int


@dataclass(frozen=True, slots=True)
class Watching:
    """How attention becomes scores.

    Attributes:
        beta: decay of a score per token (exponential moving average); 1: no decay, attention is summed up.
        reduction: over the query heads that share a key head.
        homogeneous: over all query heads of a layer instead; all its key heads then keep the same tokens.
    """

    beta: float
    reduction: Reduction = "max"
    homogeneous: bool = False

    def weights(self, num_queries: int) -> torch.Tensor:
        """[q], float32: what each query of a stride counts, (1 - beta) beta^(q-1-j); 1 if nothing decays."""
        ages = torch.arange(num_queries - 1, -1, -1, dtype=torch.float64)
        return ((1 - self.beta or 1) * self.beta**ages).float()


@dataclass(frozen=True, slots=True)
class Seen:
    """Attention a stride of q queries paid: (1 - beta) beta^(q-1-j) p_j summed over j, reduced over heads.

    Attributes:
        slots: [L, K or 1, capacity], float32: to what was in memory; 0 for empty slots.
        fresh: [L, K or 1, q], float32: to the stride's own rows.
    """

    slots: torch.Tensor
    fresh: torch.Tensor


class MemoryState(Protocol):
    """What one session's memory holds: numbers of tokens and scores, no rows and no model."""

    @property
    def seen(self) -> int:
        """Tokens so far."""
        ...

    @property
    def capacity(self) -> int:
        """Slots."""
        ...

    @property
    def runs(self) -> tuple[Run, ...]:
        """Where the entries lie, oldest first; ranks without gaps from 0 on."""
        ...

    @property
    def ids(self) -> torch.Tensor:
        """[L, K or 1, capacity], int64: number of the token in each slot, counted from 0; -1: empty."""
        ...

    @property
    def watching(self) -> Watching | None:
        """What `take` needs to see; None: nothing."""
        ...

    def take(self, num_new: int, seen: Seen | None = None) -> Moves:
        """Insert the next tokens, in order, behind the attention that they paid.

        Args:
            num_new: how many, any number.
            seen: their attention; needed if `watching`.
        """
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, in tensors of its own, for snapshots and files."""
        ...

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Become what `state` gave.

        Raises:
            ConfigError: it is of another policy, or of other sizes.
        """
        ...


class MemoryPolicy(Protocol):
    """What is kept, chosen once for a session."""

    @property
    def name(self) -> str:
        """As in tables and on the command line."""
        ...

    @property
    def budget(self) -> int | None:
        """Most entries per layer and head after an insertion, sinks included; None: no limit."""
        ...

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> MemoryState:
        """An empty memory.

        Args:
            num_layers: L.
            num_kv_heads: K.
            pinned: tokens in front that always stay; they count as sinks.
            device: of scores, ids and moves; None: main memory.

        Raises:
            ConfigError: the policy does not work for so many layers.
        """
        ...

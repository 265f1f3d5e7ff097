"""Every layer keeps other tokens of the past, and the further back the fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvrag.errors import ConfigError
from kvrag.memory.base import Moves, Run, Seen
from kvrag.memory.slots import SlotState, check_sizes, check_whole, joined, sinks_beside

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rungs:
    """A ladder: of a group of neighbouring entries each layer keeps some, at a place of its own.

    Attributes:
        group: B, entries that a ladder is laid over.
        kept: A, how many of them a layer keeps.
        shifts: [L], place of the first one that each layer keeps; 0 to B - A.
    """

    group: int
    kept: int
    shifts: tuple[int, ...]

    @property
    def removed(self) -> int:
        """R, entries that a ladder takes out of every layer."""
        return self.group - self.kept


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where the budget is exceeded, the oldest part not yet thinned gives way, in each layer another piece.

    A sweep goes from the sinks to the last L entries (L layers), one ladder after the other, and then begins
    anew over what it has thinned already: so density falls with age. Tokens are inserted as if they came one
    by one, whatever the stride. No scores are needed.

    Attributes:
        budget: tokens per layer, sinks included.
        span: S, in how many layers a token of a group stays.
        overlap: O, how many of these layers it shares with the next token.
        sinks: first tokens, which stay.
        consecutive: a token's layers are neighbours, as the paper draws it; otherwise the pattern begins anew
            every R + 1 layers, as its code does.
        overshoot: the memory may exceed its budget by R // 2, as in the paper's code.

    Raises:
        ConfigError: a setting that cannot work; the message says which.

    Source: LaCache (Shi et al. 2025, arXiv:2507.14204), iterative compaction; long strides by repeated
    sweeps instead of the released formula for them, which can keep an entry twice.
    """

    budget: int
    span: int
    overlap: int = 0
    sinks: int = 4
    consecutive: bool = False
    overshoot: bool = False
    name: ClassVar[str] = "ladder"

    def __post_init__(self) -> None:
        check_whole("budget", self.budget, 1)
        check_whole("span", self.span, 1)
        check_whole("overlap", self.overlap, 0)
        check_whole("sinks", self.sinks, 0)
        if self.overlap >= self.span:
            raise ConfigError(f"overlap is {self.overlap}; expected less than the span of {self.span} layers")

    def rungs(self, num_layers: int) -> Rungs:
        """The ladder for a model of so many layers.

        Raises:
            ConfigError: it would remove nothing.
        """
        step = self.span - self.overlap
        group = 1 + -(-(num_layers - self.span) // step)
        kept = min(-(-self.span // step), group)
        removed = group - kept
        if self.span >= num_layers or removed < 1:
            raise ConfigError(
                f"span {self.span} with overlap {self.overlap} removes nothing in a model of {num_layers} "
                f"layers; a span of {max(1, num_layers // 2)} and no overlap keep half of what is old"
                if num_layers > 1
                else "a ladder needs a model of two layers or more"
            )
        layers = range(num_layers)
        if self.consecutive:
            shifts = [min(removed, max(0, -(-(layer - self.span + 1) // step))) for layer in layers]
        else:
            shifts = [layer % (removed + 1) for layer in layers]
        return Rungs(group, kept, tuple(shifts))

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> LadderState:
        """An empty memory; all heads of a layer keep the same tokens.

        Raises:
            ConfigError: the model has too few layers for the span, or too many for the budget.
        """
        check_sizes(num_layers, num_kv_heads, pinned)
        rungs, sinks = self.rungs(num_layers), sinks_beside(self.sinks, pinned)
        least = sinks + num_layers + rungs.kept
        if self.budget < least:
            raise ConfigError(
                f"budget is {self.budget}; a ladder over {num_layers} layers behind {sinks} sinks needs "
                f"{least} or more"
            )
        return LadderState(self, rungs, sinks, device)


class LadderState(SlotState):
    """Entries in the order of their slots; the number of them is the same in all layers."""

    def __init__(self, policy: Ladder, rungs: Rungs, sinks: int, device: torch.device | None) -> None:
        capacity = policy.budget + (rungs.removed // 2 if policy.overshoot else 0)
        super().__init__((policy, sinks), len(rungs.shifts), 1, capacity, device)
        self._rungs, self._sinks = rungs, sinks
        # Layers with the same shift keep the same tokens.
        self._shifts, self._kind = np.unique(rungs.shifts, return_inverse=True)
        self.cursor, self._length = sinks, 0

    @property
    def runs(self) -> tuple[Run, ...]:
        """One, of everything."""
        return joined([(0, self._length)])

    def take(self, num_new: int, seen: Seen | None = None) -> Moves:
        """Insert the next tokens as if they came one by one; see `MemoryState`."""
        moves = super().take(num_new, seen)
        self._ids[..., self._length :] = -1  # a ladder may take out more than has come
        return moves

    def _insert(self, num_new: int, seen: Seen | None) -> Moves:
        before, capacity = self._length, self.capacity
        kept = self._thinned(before + num_new)
        self._length = kept.shape[1]
        sources = np.where(kept < before, kept, kept - before + capacity)
        slots = np.flatnonzero((sources != np.arange(self._length)).any(0))
        device = self._ids.device
        return Moves(
            torch.from_numpy(slots).to(device),
            torch.from_numpy(sources[:, slots][self._kind][:, None]).to(device),
            capacity,
        )

    def _thinned(self, length: int) -> Ints:
        """Which of so many entries stay, [kinds of layers, new length]; moves the cursor."""
        kept = np.broadcast_to(np.arange(length, dtype=np.int64), (len(self._shifts), length))
        ladders = max(0, -(-(length - self.capacity) // self._rungs.removed))
        while ladders:
            room = self.capacity - self.cursor - len(self._kind)
            laid = min(ladders, max(0, room // self._rungs.kept))
            kept = self._laid(kept, laid)
            self.cursor += laid * self._rungs.kept
            ladders -= laid
            if ladders:
                self.cursor = self._sinks
        return kept

    def _laid(self, kept: Ints, ladders: int) -> Ints:
        """The entries after so many ladders from the cursor on."""
        group, end = self._rungs.group, self.cursor + ladders * self._rungs.group
        places = np.arange(ladders)[:, None] * group + np.arange(self._rungs.kept)
        places = self.cursor + places.reshape(1, -1) + self._shifts[:, None]
        return np.concatenate([kept[:, : self.cursor], np.take_along_axis(kept, places, 1), kept[:, end:]], 1)

    def _numbers(self) -> list[int]:
        return [self._length, self.cursor]

    def _renumber(self, numbers: list[int]) -> None:
        self._length, self.cursor = numbers

"""A memory to test readers and sessions with, simple enough to be seen to be right: sinks and a ring."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryPolicy, Moves, Run, Seen, Watching
from kvrag.memory.reading import MemoryReader
from kvrag.memory.rows import MemoryRows
from kvrag.model import Model


@dataclass(frozen=True, slots=True)
class Ring:
    """The first tokens and the last ones, the same in all layers and heads.

    Attributes:
        budget: slots.
        sinks: of those, for the first tokens.
        watching: what the state asks to see; it keeps it and does nothing with it.
        name: of the policy.
    """

    budget: int
    sinks: int = 4
    watching: Watching | None = None
    name: str = "ring"

    def start(
        self, num_layers: int, num_kv_heads: int, *, pinned: int = 0, device: torch.device | None = None
    ) -> RingState:
        """See `MemoryPolicy.start`."""
        return RingState(self.budget, max(0, self.sinks - pinned), num_layers, self.watching)


@dataclass(slots=True)
class RingState:
    """See `kvrag.memory.base.MemoryState`.

    Attributes:
        told: what each stride saw.
    """

    capacity: int
    sinks: int
    num_layers: int
    watching: Watching | None
    seen: int = 0
    told: list[Seen | None] = field(default_factory=list)

    def _slot(self, token: int) -> int:
        ring = self.capacity - self.sinks
        return token if token < self.sinks else self.sinks + (token - self.sinks) % ring

    @property
    def runs(self) -> tuple[Run, ...]:
        """Sinks, the ring from its oldest slot on, the ring's beginning."""
        if self.seen <= self.capacity:
            return (Run(0, self.seen, 0),) if self.seen else ()
        oldest = self._slot(self.seen)
        late = self.capacity - oldest
        runs = (
            Run(0, self.sinks, 0),
            Run(oldest, late, self.sinks),
            Run(self.sinks, oldest - self.sinks, self.sinks + late),
        )
        return tuple(run for run in runs if run.length)

    @property
    def ids(self) -> torch.Tensor:
        """[L, 1, capacity]."""
        found = torch.full((self.num_layers, 1, self.capacity), -1)
        for token in range(self.seen):
            found[:, :, self._slot(token)] = token
        return found

    def take(self, num_new: int, seen: Seen | None = None) -> Moves:
        """The last of the tokens that fall into one slot stays."""
        self.told.append(seen)
        last = {self._slot(self.seen + i): i for i in range(num_new)}
        self.seen += num_new
        rows = torch.tensor(list(last.values())) + self.capacity
        return Moves(torch.tensor(list(last)), rows.expand(self.num_layers, 1, -1), self.capacity)

    def state(self) -> dict[str, torch.Tensor]:
        """One number."""
        return {"seen": torch.tensor(self.seen)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Become that."""
        if set(state) != {"seen"}:
            raise ConfigError(f"this is the state of another policy: it has {', '.join(sorted(state))}")
        self.seen = int(state["seen"])


def empty_rows(model: Model) -> MemoryRows:
    """A memory for a model, with nothing in it."""
    return MemoryRows(model.specs, model.shapes, dtype=model.dtype, device=model.device)


def memory_reader(model: Model, policy: MemoryPolicy, *, stride: int = 16) -> MemoryReader:
    """Reads into an empty memory, with nothing pinned."""
    state = policy.start(model.num_layers, model.shapes[0][0])
    return MemoryReader(model, state, empty_rows(model), stride=stride)

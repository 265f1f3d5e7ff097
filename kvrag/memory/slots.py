"""What states of bounded memories have in common: ids in slots, runs over rings, exact copies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
import xxhash

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryState, Moves, Run, Seen, Watching

_MOST_TOKENS = 2**31 - 1  # ids are kept in four bytes


def joined(pieces: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """Runs of pieces (first slot, length), oldest first; neighbours become one, empty ones vanish."""
    runs: list[Run] = []
    rank = 0
    for slot, length in pieces:
        if not length:
            continue
        if runs and runs[-1].slot + runs[-1].length == slot:
            last = runs.pop()
            runs.append(Run(last.slot, last.length + length, last.rank))
        else:
            runs.append(Run(slot, length, rank))
        rank += length
    return tuple(runs)


def ring(slot: int, width: int, stored: int, start: int) -> Iterator[tuple[int, int]]:
    """Pieces of a ring of `width` slots from `slot` on, oldest first."""
    until_end = min(stored, width - start)
    yield slot + start, until_end
    yield slot, stored - until_end


def without(runs: tuple[Run, ...], first: int, end: int) -> tuple[Run, ...]:
    """The runs as if the entries of ranks first..end-1 were not there; who stood behind them moves up."""

    def pieces() -> Iterator[tuple[int, int]]:
        for run in runs:
            before = min(run.length, max(0, first - run.rank))
            behind = max(before, min(run.length, end - run.rank))
            yield run.slot, before
            yield run.slot + behind, run.length - behind

    return joined(pieces())


def in_order(state: MemoryState) -> torch.Tensor:
    """[L, K or 1, m], int64: numbers of the tokens that are kept, oldest first."""
    ids = state.ids
    parts = [ids[..., run.slot : run.slot + run.length] for run in state.runs]
    return torch.cat(parts, dim=-1) if parts else ids[..., :0]


def move(moves: Moves, old: torch.Tensor, new: torch.Tensor) -> None:
    """Do to numbers what moves say of rows.

    Args:
        moves: sources [L, K or 1, m].
        old: [L, K or 1, num_before], written to.
        new: [L, K or 1, q] or what expands to it, same dtype.
    """
    if not new.shape[-1]:
        return
    new, slots = new.expand(*old.shape[:2], -1), moves.slots
    if 4 * len(slots) > moves.num_before:  # then a pass over everything is the shorter way
        old[..., slots] = torch.cat([old, new], dim=-1).gather(-1, moves.sources)
        return
    rows = moves.sources - moves.num_before
    from_old = old.gather(-1, moves.sources.clamp(max=moves.num_before - 1))
    old[..., slots] = torch.where(rows >= 0, new.gather(-1, rows.clamp(min=0)), from_old)


class SlotState(ABC):
    """A memory of a fixed number of slots: numbers of tokens, no rows.

    Args:
        settings: everything that the meaning of the state depends on, for `restore` to compare.
        num_layers: L.
        heads: K, or 1 if all heads keep the same tokens.
        capacity: slots.
        device: of all tensors.
    """

    def __init__(
        self, settings: object, num_layers: int, heads: int, capacity: int, device: torch.device | None
    ) -> None:
        self._settings = repr((settings, num_layers, heads, capacity))
        self._ids = torch.full((num_layers, heads, capacity), -1, dtype=torch.int32, device=device)
        self.seen = 0

    @property
    def capacity(self) -> int:
        """Slots."""
        return self._ids.shape[-1]

    @property
    def ids(self) -> torch.Tensor:
        """[L, K or 1, capacity], int64: number of the token in each slot, counted from 0; -1: empty."""
        return self._ids.long()

    @property
    def watching(self) -> Watching | None:
        """What `take` needs to see; None: nothing."""
        return None

    @property
    @abstractmethod
    def runs(self) -> tuple[Run, ...]:
        """Where the entries lie, oldest first; ranks without gaps from 0 on."""

    @abstractmethod
    def _insert(self, num_new: int, seen: Seen | None) -> Moves:
        """Decide about the next tokens; ids and `seen` follow by themselves."""

    def take(self, num_new: int, seen: Seen | None = None) -> Moves:
        """Insert the next tokens, in order, behind the attention that they paid.

        Args:
            num_new: how many, any number from 0 on.
            seen: their attention; needed if `watching`.

        Raises:
            ConfigError: a number or an attention that cannot be, and nothing has changed.
        """
        if num_new < 0 or self.seen + num_new > _MOST_TOKENS:
            raise ConfigError(
                f"a memory takes from 0 to {_MOST_TOKENS - self.seen} tokens more, not {num_new}"
            )
        self._check(num_new, seen)
        moves = self._insert(num_new, seen)
        fresh = torch.arange(self.seen, self.seen + num_new, dtype=torch.int32, device=self._ids.device)
        move(moves, self._ids, fresh)
        self.seen += num_new
        return moves

    def _check(self, num_new: int, seen: Seen | None) -> None:
        if self.watching is None:
            return
        if seen is None:
            raise ConfigError("this memory chooses by attention; take() needs what the tokens have seen")
        shapes = [*self._ids.shape], [*self._ids.shape[:2], num_new]
        for name, found, expected in zip(("slots", "fresh"), (seen.slots, seen.fresh), shapes, strict=True):
            if [*found.shape] != expected:
                raise ConfigError(f"attention to {name} must be {expected}, not {[*found.shape]}")

    def _numbers(self) -> list[int]:
        """Integers of the state beside ids and `seen`, always as many."""
        return []

    def _renumber(self, numbers: list[int]) -> None:
        """Take what `_numbers` gave; ids and scores are restored already."""
        assert not numbers

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of the state, the ones that are written to."""
        return {"ids": self._ids}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, in tensors of its own, for snapshots and files."""
        numbers = torch.tensor([fingerprint(self._settings), self.seen, *self._numbers()])
        return {"numbers": numbers, **{name: x.clone() for name, x in self._tensors().items()}}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Become what `state` gave.

        Raises:
            ConfigError: it is of another policy, or of other sizes; nothing has changed.
        """
        mine = self._tensors()
        expected = {name: (x.shape, x.dtype) for name, x in mine.items()}
        expected["numbers"] = (torch.Size([2 + len(self._numbers())]), torch.int64)
        if {name: (x.shape, x.dtype) for name, x in state.items()} != expected:
            raise ConfigError(f"this state is of another memory than {self._settings}")
        digest, seen, *numbers = state["numbers"].tolist()
        if digest != fingerprint(self._settings):
            raise ConfigError(f"this state is of a policy with other settings than {self._settings}")
        for name, x in mine.items():
            x.copy_(state[name])
        self.seen = seen
        self._renumber(numbers)


def fingerprint(settings: str) -> int:
    """A number of 63 bits that is another one for other settings."""
    return xxhash.xxh3_64_intdigest(settings.encode()) >> 1


def first_slots(num_sinks: int, seen: int, num_new: int) -> int:
    """How many of the next tokens become sinks."""
    return min(num_new, max(0, num_sinks - seen))


def sinks_beside(sinks: int, pinned: int) -> int:
    """How many sinks a memory keeps itself behind so many pinned tokens."""
    return max(0, sinks - pinned)


def check_whole(name: str, value: int, least: int) -> None:
    """Refuse a setting that is no whole number, or too small a one.

    Raises:
        ConfigError: with the name, the value and what would work.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number from {least} on")


def check_budget(budget: int, sinks: int, others: int = 1, what: str = "") -> None:
    """Refuse a budget that leaves too little beside the sinks.

    Args:
        budget: tokens per layer and head, sinks included.
        sinks: first tokens, which stay.
        others: how many more there have to be.
        what: what needs them, as a message says it before the sinks.

    Raises:
        ConfigError: says how many are needed.
    """
    check_whole("sinks", sinks, 0)
    check_whole("budget", budget, 1)
    if budget < sinks + others:
        raise ConfigError(f"budget is {budget}; {what}{sinks} sinks need {sinks + others} or more")


def check_sizes(num_layers: int, num_kv_heads: int, pinned: int) -> None:
    """Refuse sizes of a model that cannot be.

    Raises:
        ConfigError: one of them is too small.
    """
    check_whole("num_layers", num_layers, 1)
    check_whole("num_kv_heads", num_kv_heads, 1)
    check_whole("pinned", pinned, 0)

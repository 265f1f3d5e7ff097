"""The test suite of memory policies: subclass it, supply the policy, inherit every test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest
import torch

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryPolicy, MemoryState, Moves, Seen
from kvrag.memory.slots import in_order


def example_seen(state: MemoryState, num_new: int, generator: torch.Generator) -> Seen | None:
    """Attention of no real model, as a stride of so many tokens might have paid it; None if not needed."""
    if state.watching is None:
        return None
    layers, heads, capacity = state.ids.shape
    slots = torch.rand((layers, heads, capacity), generator=generator) * (state.ids >= 0).cpu() / 64
    return Seen(slots, torch.rand((layers, heads, num_new), generator=generator))


def static_seen(state: MemoryState, scores: torch.Tensor) -> Seen:
    """Scores [L, K or 1, q] that the next tokens get, and that no attention changes; for a beta of 1."""
    return Seen(torch.zeros(state.ids.shape), scores)


class Mirror:
    """Rows of a memory that hold nothing but the numbers of their tokens, moved as the moves say.

    Args:
        state: an empty one.
    """

    def __init__(self, state: MemoryState) -> None:
        self.state = state
        self.rows = torch.full(state.ids.shape, -1)

    def take(self, num_new: int, seen: Seen | None) -> Moves:
        """Let the state take tokens, and move the rows."""
        first, old = self.state.seen, self.rows
        moves = self.state.take(num_new, seen)
        assert moves.num_before == old.shape[-1]
        sources = moves.sources.expand(*old.shape[:2], -1)
        stride = torch.arange(first, first + num_new).expand(*old.shape[:2], -1)
        self.rows = torch.full(self.state.ids.shape, -1)
        self.rows[..., : old.shape[-1]] = old
        self.rows[..., moves.slots] = torch.cat([old, stride], dim=-1).gather(-1, sources)
        return moves


class MemoryPolicyContract(ABC):
    """What every policy must do. Subclass as `class TestMine(MemoryPolicyContract)` and define `make_policy`.

    Override `num_layers` and `num_kv_heads` if the policy needs others.
    """

    num_layers = 6
    num_kv_heads = 2

    keeps_until: int | None = None
    """Tokens up to which nothing is lost; None: the memory's capacity, or for ever without a budget."""

    strides: Sequence[int] = (1, 1, 5, 1, 64, 3, 200, 1, 1, 0, 17, 700, 1)
    """Lengths of strides, some longer than any budget should be; about a thousand tokens."""

    @abstractmethod
    def make_policy(self) -> MemoryPolicy:
        """A policy with a budget below 300 tokens, or without one."""

    @pytest.fixture
    def policy(self) -> MemoryPolicy:
        """The policy under test."""
        return self.make_policy()

    @pytest.fixture
    def state(self, policy: MemoryPolicy) -> MemoryState:
        """An empty memory of it."""
        return policy.start(self.num_layers, self.num_kv_heads)

    @pytest.fixture
    def generator(self) -> torch.Generator:
        """What attention is made from."""
        return torch.Generator().manual_seed(6)

    def test_a_memory_starts_empty(self, state: MemoryState) -> None:
        """Nothing is seen, nothing is kept, no slot is filled."""
        assert state.seen == 0
        assert state.runs == ()
        assert (state.ids == -1).all()
        assert state.ids.dtype == torch.int64
        assert state.ids.shape[0] == self.num_layers
        assert state.ids.shape[1] in {1, self.num_kv_heads}
        assert state.ids.shape[2] == state.capacity

    def test_the_budget_is_never_exceeded(
        self, policy: MemoryPolicy, state: MemoryState, generator: torch.Generator
    ) -> None:
        """After every stride of whatever length; and the newest token is there."""
        for stride in self.strides:
            state.take(stride, example_seen(state, stride, generator))
            kept = in_order(state)
            assert policy.budget is None or kept.shape[-1] <= policy.budget
            assert (kept[..., -1] == state.seen - 1).all()
        assert state.seen == sum(self.strides)

    def test_runs_say_what_lies_where(self, state: MemoryState, generator: torch.Generator) -> None:
        """Ranks without gaps, slots within the capacity and none twice, the others empty."""
        for stride in self.strides:
            state.take(stride, example_seen(state, stride, generator))
            slots = [slot for run in state.runs for slot in range(run.slot, run.slot + run.length)]
            ranks = [rank for run in state.runs for rank in range(run.rank, run.rank + run.length)]
            assert ranks == list(range(len(ranks)))
            assert len(set(slots)) == len(slots)
            filled = torch.zeros(state.capacity, dtype=torch.bool)
            filled[slots] = True
            assert ((state.ids >= 0) == filled).all()

    def test_tokens_stand_in_their_order(self, state: MemoryState, generator: torch.Generator) -> None:
        """In every layer and head, so none is there twice."""
        for stride in self.strides:
            state.take(stride, example_seen(state, stride, generator))
            kept = in_order(state)
            assert (kept.diff(dim=-1) > 0).all()
            assert (kept < state.seen).all()

    def test_moves_bring_every_row_to_its_slot(self, state: MemoryState, generator: torch.Generator) -> None:
        """Whoever follows the moves holds in each filled slot the row of the token that the ids name."""
        mirror = Mirror(state)
        for stride in self.strides:
            moves = mirror.take(stride, example_seen(state, stride, generator))
            assert len(set(moves.slots.tolist())) == len(moves.slots)
            assert moves.sources.shape[0] == self.num_layers
            assert moves.sources.shape[1] in {1, self.num_kv_heads}
            filled = state.ids >= 0
            assert torch.equal(mirror.rows[filled], state.ids[filled])

    def test_below_the_budget_nothing_is_lost(
        self, policy: MemoryPolicy, state: MemoryState, generator: torch.Generator
    ) -> None:
        """Every token is there, at its own rank."""
        most = self.keeps_until or (60 if policy.budget is None else state.capacity)
        while state.seen < most:
            stride = min(1 + state.seen // 3, most - state.seen)
            state.take(stride, example_seen(state, stride, generator))
            kept = in_order(state)
            assert torch.equal(kept, torch.arange(state.seen).expand_as(kept))

    def test_pinned_tokens_only_widen(self, policy: MemoryPolicy, generator: torch.Generator) -> None:
        """Behind pinned tokens the budget holds as before."""
        state = policy.start(self.num_layers, self.num_kv_heads, pinned=1000)
        for stride in self.strides:
            state.take(stride, example_seen(state, stride, generator))
        assert policy.budget is None or in_order(state).shape[-1] <= policy.budget

    def test_a_restored_state_goes_on_as_the_one_it_was_taken_of(
        self, policy: MemoryPolicy, generator: torch.Generator
    ) -> None:
        """At every point, restored into a fresh state and into a used one; a state that was given stays."""
        one, used = (policy.start(self.num_layers, self.num_kv_heads) for _ in range(2))
        used.take(9, example_seen(used, 9, generator))
        for i, stride in enumerate(self.strides):
            state = one.state()
            fresh = policy.start(self.num_layers, self.num_kv_heads)
            fresh.restore(state)
            used.restore(state)
            seen = example_seen(one, stride, torch.Generator().manual_seed(i))
            moves = one.take(stride, seen)
            for other in (fresh, used):
                assert_same_moves(other.take(stride, seen), moves)
                assert_same_state(other, one)

    def test_states_of_others_are_refused(self, policy: MemoryPolicy, state: MemoryState) -> None:
        """A state of other sizes or of no policy at all changes nothing."""
        state.take(3, example_seen(state, 3, torch.Generator().manual_seed(0)))
        before = state.state()
        other = policy.start(self.num_layers + 1, self.num_kv_heads)
        for foreign in (other.state(), {}, {"numbers": torch.zeros(1, dtype=torch.int64)}):
            with pytest.raises(ConfigError, match="this state is of"):
                state.restore(foreign)
        after = state.state()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_stride_of_nothing_changes_nothing(
        self, state: MemoryState, generator: torch.Generator
    ) -> None:
        """Twice, after some tokens: no slot is written."""
        state.take(50, example_seen(state, 50, generator))
        before = state.ids.clone()
        for _ in range(2):
            moves = state.take(0, example_seen(state, 0, generator))
            assert not len(moves.slots)
            assert torch.equal(state.ids, before)

    def test_a_number_of_tokens_below_zero_is_refused(self, state: MemoryState) -> None:
        """Before anything has changed."""
        with pytest.raises(ConfigError, match="-1"):
            state.take(-1, example_seen(state, 0, torch.Generator()))
        assert state.seen == 0

    def test_sizes_that_cannot_be_are_refused(self, policy: MemoryPolicy) -> None:
        """No layers, no heads, less than nothing pinned."""
        for layers, heads, pinned in ((0, 1, 0), (self.num_layers, 0, 0), (self.num_layers, 1, -1)):
            with pytest.raises(ConfigError):
                policy.start(layers, heads, pinned=pinned)


def assert_same_moves(found: Moves, expected: Moves) -> None:
    """Fail unless every number is equal."""
    assert found.num_before == expected.num_before
    assert torch.equal(found.slots, expected.slots)
    assert torch.equal(found.sources, expected.sources)


def assert_same_state(found: MemoryState, expected: MemoryState) -> None:
    """Fail unless both would say and write the same."""
    assert found.seen == expected.seen
    assert found.runs == expected.runs
    mine, theirs = found.state(), expected.state()
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        assert torch.equal(x, theirs[name]), name

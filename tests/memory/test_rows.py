"""Rows in slots: moves, growth, journals, 16-bit keys that are never rotated twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.memory.base import Moves, Run
from kvrag.memory.rows import MemoryRows, images_of, journal_of
from kvrag.rotary import LayerSpec, Rotation, rotate
from kvrag_kernels import using

ROTATION = Rotation((1.0, 0.3, 0.01, 0.002))
SPECS = (LayerSpec(ROTATION), LayerSpec(None), LayerSpec(ROTATION, window=3))
SHAPES = ((2, 8, 6),) * 3


def rows_of(dtype: torch.dtype = torch.float32) -> MemoryRows:
    return MemoryRows(SPECS, SHAPES, dtype=dtype, device=torch.device("cpu"))


class Lists:
    """The definition: for each layer and head a dict from slot to unrotated key and value."""

    def __init__(self) -> None:
        self.held: list[list[dict[int, tuple[torch.Tensor, torch.Tensor]]]] = [
            [{} for _ in range(heads)] for heads, _, _ in SHAPES
        ]

    def apply(self, moves: Moves, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        for i, heads in enumerate(self.held):
            for j, held in enumerate(heads):
                sources = moves.sources[i][min(j, moves.sources.shape[1] - 1)].tolist()
                before = dict(held)
                for slot, source in zip(moves.slots.tolist(), sources, strict=True):
                    row = source - moves.num_before
                    held[slot] = (keys[i][j, row], values[i][j, row]) if row >= 0 else before[source]


def check(rows: MemoryRows, lists: Lists, atol: float) -> None:
    for spec, layer, heads in zip(SPECS, rows.layers, lists.held, strict=True):
        for j, held in enumerate(heads):
            for slot, (key, value) in held.items():
                turn = None if spec.rotation is None else spec.rotation.turn(torch.tensor([slot]))
                expected = rotate(key[None, None, None], turn)[0, 0, 0]
                torch.testing.assert_close(layer.keys[j, slot], expected, atol=atol, rtol=0)
                assert torch.equal(layer.values[j, slot], value)


@st.composite
def strides(draw: st.DrawFn) -> list[tuple[int, Moves]]:
    """Moves as a policy might make them: any slots, sources anywhere that something lies."""
    capacity, made, filled = 12, [], 0
    for _ in range(draw(st.integers(1, 8))):
        num_new = draw(st.integers(1, 5))
        slots = draw(st.permutations(range(filled + 1 if filled < capacity else capacity)))
        slots = sorted(set(slots[: draw(st.integers(1, 6))]) | ({filled} if filled < capacity else set()))
        heads = draw(st.sampled_from((1, 2)))
        pool = st.sampled_from([*range(filled), *range(capacity, capacity + num_new)])
        one = st.lists(pool, min_size=len(slots), max_size=len(slots))
        sources = [[draw(one) for _ in range(heads)] for _ in SPECS]
        made.append((num_new, Moves(torch.tensor(slots), torch.tensor(sources), capacity)))
        filled = max(filled, slots[-1] + 1)
    return made


def fresh(num_new: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    keys = [torch.randn(heads, num_new, key).to(dtype) for heads, key, _ in SHAPES]
    values = [torch.randn(heads, num_new, value).to(dtype) for heads, _, value in SHAPES]
    return keys, values


@given(strides(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_moves_do_what_they_say(made: list[tuple[int, Moves]], dtype: torch.dtype) -> None:
    """Also where a slot is read and written at once; 16-bit keys are those of one rotation, bit for bit."""
    rows, lists = rows_of(dtype), Lists()
    for num_new, moves in made:
        keys, values = fresh(num_new, dtype)
        rows.apply(moves, keys, values, capacity=12)
        lists.apply(moves, keys, values)
    check(rows, lists, 1e-5 if dtype == torch.float32 else 0.0)
    assert rows.num_slots <= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_move_the_same_rows(dtype: torch.dtype) -> None:
    plain, moved, lists = rows_of(dtype), rows_of(dtype), Lists()
    for slots, sources in (
        ([0, 1, 2, 3], [12, 13, 14, 15]),
        ([3, 0, 4], [0, 3, 12]),
        ([1, 2, 5], [2, 1, 13]),
    ):
        moves = Moves(torch.tensor(slots), torch.tensor(sources).expand(3, 1, -1), 12)
        keys, values = fresh(4, dtype)
        plain.apply(moves, keys, values, capacity=12)
        with using("triton"):
            moved.apply(moves, keys, values, capacity=12)
        lists.apply(moves, keys, values)
    check(moved, lists, 1e-5 if dtype == torch.float32 else 0.02)
    for mine, theirs in zip(moved.layers, plain.layers, strict=True):
        assert torch.equal(mine.values[:, :6], theirs.values[:, :6])
        torch.testing.assert_close(mine.keys[:, :6], theirs.keys[:, :6], atol=1e-5, rtol=0.01)


@given(strides(), st.integers(0, 7), st.integers(0, 7))
def test_a_journal_brings_back_what_was_and_what_is(
    made: list[tuple[int, Moves]], first: int, second: int
) -> None:
    rows = rows_of(torch.bfloat16)
    border, end = sorted((first % (len(made) + 1), second % (len(made) + 1)))

    def go(part: list[tuple[int, Moves]]) -> None:
        for num_new, moves in part:
            rows.apply(moves, *fresh(num_new, torch.bfloat16), capacity=12)

    def held() -> list[torch.Tensor]:
        return [t[:, rows._written].clone() for layer in rows.layers for t in layer.tensors]

    def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
        """In the slots that were in use at the time."""
        return all(torch.equal(a[:, : b.shape[1]], b) for a, b in zip(found, expected, strict=True))

    go(made[:border])
    before = held()
    one = rows.begin()
    go(made[border:end])
    between = held()
    two = rows.begin()
    go(made[end:])
    rows.end()
    after = held()
    again = rows.revert(two)
    assert same(held(), between)
    further = rows.revert(journal_of(images_of(one), rows))
    assert same(held(), before)
    rows.revert(further)
    rows.revert(again)
    assert same(held(), after)


def test_a_journal_keeps_each_slot_once() -> None:
    rows = rows_of()
    moves = Moves(torch.arange(4), torch.arange(4).add(12).expand(3, 1, -1), 12)
    rows.apply(moves, *fresh(4, torch.float32), capacity=12)
    journal = rows.begin()
    for _ in range(50):
        rows.apply(moves, *fresh(4, torch.float32), capacity=12)
    assert journal.num_bytes == 3 * 2 * 4 * (8 + 6) * 4
    assert rows.num_bytes == 3 * 2 * rows.num_slots * (8 + 6) * 4


def test_a_run_is_a_segment_at_its_rank() -> None:
    rows = rows_of()
    moves = Moves(torch.arange(6), torch.arange(6).add(12).expand(3, 1, -1), 12)
    rows.apply(moves, *fresh(6, torch.float32), capacity=12)
    one, two = rows.segments((Run(4, 2, 0), Run(0, 3, 2), Run(3, 0, 5)), 100)
    assert (one.target, one.native, one.end, one.shift) == (100, 4, 102, 96)
    assert (two.target, two.native, two.end) == (102, 0, 105)
    assert one.kv.layers[0].keys.data_ptr() == rows.layers[0].keys[:, 4:].data_ptr()


def test_a_copy_shares_nothing_and_tensors_come_back() -> None:
    rows = rows_of(torch.bfloat16)
    moves = Moves(torch.arange(6), torch.arange(6).add(12).expand(3, 1, -1), 12)
    rows.apply(moves, *fresh(6, torch.bfloat16), capacity=12)
    other, third = rows.copy(), rows_of(torch.bfloat16)
    third.load({name: tensor.clone() for name, tensor in rows.tensors().items()})
    rows.apply(moves, *fresh(6, torch.bfloat16), capacity=12)
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, third.tensors()[name])
    assert not torch.equal(other.layers[0].keys, rows.layers[0].keys)
    wrong = third.tensors() | {"000.keys": torch.zeros(2, 3, 8, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"000\.keys is \(2, 3, 8\)"):
        third.load(wrong)
    with pytest.raises(ValueError, match="cannot become"):
        third.load({"written": rows._written})

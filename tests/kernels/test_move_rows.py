"""Rows that change their slots are the ones that were there, turned to where they are."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from kvrag_kernels._backend import using
from kvrag_kernels.move_rows import Moving, Places, Spin, move_rows, move_rows_reference

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A memory of a few layers and what happens to it."""

    slots: int = 50
    fresh: int = 12
    moved: int = 20
    layers: int = 3
    heads: int = 2
    dim: int = 16
    value_dim: int = 16
    shared: bool = False
    pairs: int = 8
    start: int = 0
    interleaved: bool = False
    dtype: torch.dtype = torch.float32
    far: int = 1


CASES = {
    "float32 turns by the difference": Case(),
    "one choice for all heads": Case(shared=True, heads=3),
    "half precision turns from a copy": Case(dtype=torch.float16, moved=37),
    "interleaved, partly rotated": Case(dim=24, value_dim=20, pairs=5, start=3, interleaved=True),
    "far apart": Case(slots=40, moved=10, far=3000, layers=1, heads=1),
    "nothing new": Case(fresh=0),
    "nothing there yet": Case(moved=12, slots=12),
    "nothing moves": Case(moved=0),
}


@dataclass
class Memory:
    rows: list[Moving]
    places: Places
    raw: list[torch.Tensor]
    """Per layer [K, n + q, D]: all keys as they were before any rotation, in float64."""
    values: list[torch.Tensor]
    lies: torch.Tensor


def rotated(x: torch.Tensor, distances: torch.Tensor, spin: Spin) -> torch.Tensor:
    """[K, n, D] by [K, n] positions, in float64."""
    out, pairs = x.double().clone(), len(spin.frequencies)
    angles = distances.double()[..., None] * torch.tensor(spin.frequencies, dtype=torch.float64)
    index = torch.arange(pairs)
    first, second = (
        (spin.start + 2 * index, spin.start + 2 * index + 1)
        if spin.interleaved
        else (spin.start + index, spin.start + pairs + index)
    )
    a, b = out[..., first], out[..., second]
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out


def make(case: Case) -> Memory:
    seed = secrets.randbits(31)
    print("seed", seed)  # shown when a test fails
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    # Only every `far`-th slot is used where positions are to be large.
    num_slots = case.slots * case.far
    lies = torch.arange(case.slots) * case.far
    fills = lies[torch.randperm(case.slots, generator=generator)[: case.moved]]
    is_first = case.moved == case.slots  # every slot is filled for the first time, from the stride alone
    heads = 1 if case.shared else case.heads
    chosen = torch.randint(case.slots + case.fresh, (case.layers, heads, case.moved), generator=generator)
    if is_first:
        chosen = case.slots + torch.rand(case.layers, heads, case.moved, generator=generator).argsort(-1)
    sources = torch.where(chosen < case.slots, chosen * case.far, chosen - case.slots + num_slots)
    rows, raws, all_values = [], [], []
    for layer in range(case.layers):
        frequencies = torch.rand(case.pairs, generator=generator).double()
        spin = Spin(tuple(frequencies.tolist()), case.start, case.interleaved)
        raw, values = normal(case.heads, num_slots, case.dim), normal(case.heads, num_slots, case.value_dim)
        keys = rotated(raw, torch.arange(num_slots).expand(case.heads, -1), spin).to(case.dtype)
        fresh = [normal(case.heads, case.fresh, d) for d in (case.dim, case.value_dim)]
        raws.append(torch.cat((raw, fresh[0]), dim=1))
        all_values.append(torch.cat((values, fresh[1]), dim=1))
        rows.append(Moving(layer, values, values, fresh[1]))
        if case.dtype == torch.float32:
            rows.append(Moving(layer, keys, keys, fresh[0], spin, is_turned=True))
        else:
            rows.append(Moving(layer, keys, raw, fresh[0], spin))
            rows.append(Moving(layer, raw, raw, fresh[0]))
    return Memory(rows, Places(fills, sources, num_slots), raws, all_values, lies)


def expect(memory: Memory, moving: Moving) -> torch.Tensor:
    """[K, n, D], float64: what a tensor is to hold in the end, at every slot."""
    places, layer = memory.places, moving.layer
    holds = torch.arange(places.num_before).expand(moving.into.shape[0], -1).clone()
    holds[:, places.slots] = places.of(moving)
    is_key = moving.spin is not None or moving.held.shape[-1] != memory.values[layer].shape[-1]
    is_raw = moving.spin is None and moving.into.data_ptr() in {
        x.held.data_ptr() for x in memory.rows if x.spin is not None and not x.is_turned
    }
    everything = memory.raw[layer] if is_key or is_raw else memory.values[layer]
    found = everything.gather(1, holds[..., None].expand(-1, -1, everything.shape[2])).double()
    if moving.spin is None:
        return found
    return rotated(found, torch.arange(places.num_before).expand(holds.shape), moving.spin)


def run(case: Case, move: Callable[[list[Moving], Places], None], device: str = "cpu") -> None:
    memory = make(case)
    expected = [expect(memory, x) for x in memory.rows]
    before = [x.into.clone() for x in memory.rows]
    on = {t.data_ptr(): t.to(device) for x in memory.rows for t in (x.into, x.held, x.fresh)}
    rows = [
        Moving(x.layer, on[x.into.data_ptr()], on[x.held.data_ptr()], x.fresh.to(device), x.spin, x.is_turned)
        for x in memory.rows
    ]
    p = memory.places
    move(rows, Places(p.slots.to(device), p.sources.to(device), p.num_before))
    stay = torch.ones(p.num_before, dtype=torch.bool)
    stay[p.slots] = False
    for x, was, want in zip(rows, before, expected, strict=True):
        found = x.into.cpu()
        assert torch.equal(found[:, stay], was[:, stay])
        there = memory.lies  # every slot that is used
        if x.spin is None:
            assert torch.equal(found[:, there].double(), want[:, there])
        else:
            error = (found[:, there].double() - want[:, there]).norm() / want[:, there].norm()
            assert error < TOLERANCE[case.dtype]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that what nobody writes is seen."""
    empty = torch.Tensor.new_empty

    def poison(*shape: object, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poisoned")
def test_in_pytorch(case: Case) -> None:
    run(case, move_rows_reference)


@needs_triton
@pytest.mark.parametrize("taken", [1, 1 << 28], ids=["layer by layer", "all layers at once"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poisoned")
def test_kernels(case: Case, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvrag_kernels.move_rows import launch

    monkeypatch.setattr(launch, "_TAKEN_BYTES", taken)
    with using("triton"):
        run(case, move_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    with using("triton"):
        run(replace(case, dtype=dtype), move_rows, "cuda")


@pytest.mark.gpu
def test_a_hundred_runs_on_a_gpu_are_equal_bit_for_bit() -> None:
    memory = make(Case(slots=4000, fresh=700, moved=1500, heads=8, dim=128, value_dim=128, pairs=64))
    places = Places(memory.places.slots.cuda(), memory.places.sources.cuda(), memory.places.num_before)
    first: list[torch.Tensor] | None = None
    for _ in range(100):
        on = {t.data_ptr(): t.cuda() for x in memory.rows for t in (x.into, x.held)}
        rows = [
            replace(x, into=on[x.into.data_ptr()], held=on[x.held.data_ptr()], fresh=x.fresh.cuda())
            for x in memory.rows
        ]
        with using("triton"):
            move_rows(rows, places)
        found = [x.into.clone() for x in rows]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_slots_may_change_places() -> None:
    x = torch.arange(8.0).view(1, 4, 2)
    places = Places(torch.tensor([0, 3, 1]), torch.tensor([[[3, 0, 1]]]), 4)
    move_rows([Moving(0, x, x, x[:, :0])], places)
    assert x.tolist() == [[[6, 7], [2, 3], [4, 5], [0, 1]]]


@pytest.mark.parametrize(
    ("moving", "message"),
    [
        (Moving(0, torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), torch.zeros(2, 1, 6)), "have to be the same"),
        (Moving(0, torch.zeros(2, 4, 8), torch.zeros(2, 4, 8).half(), torch.zeros(2, 1, 8)), "dtypes"),
        (Moving(1, torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), torch.zeros(2, 1, 8)), "layer 1"),
        (Moving(0, torch.zeros(3, 4, 8), torch.zeros(3, 4, 8), torch.zeros(3, 1, 8)), "3 heads"),
        (Moving(0, *[torch.zeros(2, 4, 8)] * 3, Spin((1.0,) * 4, start=1)), "no 4 pairs"),
    ],
)
def test_what_does_not_fit_is_refused(moving: Moving, message: str) -> None:
    places = Places(torch.tensor([0]), torch.zeros(1, 2, 1, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=message):
        move_rows([moving], places)

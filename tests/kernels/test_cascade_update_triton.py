"""The tournament in Triton is the insertion token by token, bit for bit."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch

from kvrag_kernels._backend import using
from kvrag_kernels.cascade_update import CascadeUpdate, cascade_update, cascade_update_reference

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@dataclass(frozen=True)
class Case:
    """A cascade, and the strides that it takes in."""

    width: int
    periods: tuple[int, ...]
    strides: tuple[int, ...]
    eager: bool = True
    layers: int = 2
    heads: int = 3
    levels: int = 1000
    dtype: torch.dtype = torch.float32


CASES = {
    "powers of two": Case(8, (1, 2, 4), (10, 20, 33, 1)),
    "many ties": Case(5, (1, 2, 4), (31, 17), levels=2),
    "one token at a time": Case(2, (1, 2, 4, 8), (1,) * 12, eager=False),
    "a window": Case(7, (1,), (3, 30, 2)),
    "long segments": Case(4, (1, 16), (20, 40), layers=1),
    "periods that do not divide": Case(3, (2, 5, 3), (25, 14), eager=False),
    "no token": Case(3, (1, 2), (0, 9, 0)),
    "half precision": Case(6, (1, 2), (30,), dtype=torch.float16),
    "more heads than lanes": Case(3, (1, 2), (9, 9), layers=9, heads=9, dtype=torch.float64),
}


def assert_same(found: CascadeUpdate, expected: CascadeUpdate) -> None:
    assert torch.equal(found.slots.cpu(), expected.slots.cpu())
    assert torch.equal(found.sources.cpu(), expected.sources.cpu())
    assert (found.stored, found.start) == (expected.stored, expected.start)


def follow(case: Case, device: str) -> None:
    """All strides of a case, by the kernel and by the definition."""
    seed = secrets.randbits(31)
    print("seed", seed)  # shown when a test fails
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randint(case.levels, shape, generator=generator) / 8).to(case.dtype)

    shape = (case.layers, case.heads, case.width * len(case.periods))
    scores = torch.full(shape, torch.nan, dtype=case.dtype)  # nobody looks at empty slots
    stored = start = (0,) * len(case.periods)
    arrived, options = 0, {"periods": case.periods, "width": case.width, "eager": case.eager}
    for stride in case.strides:
        fresh = random(case.layers, case.heads, stride)
        rest = (stored, start, arrived)
        expected = cascade_update_reference(scores, fresh, *rest, **options)
        with using("triton"):
            found = cascade_update(scores.to(device), fresh.to(device), *rest, **options)
        assert_same(found, expected)
        scores[..., expected.slots] = torch.cat([scores, fresh], dim=-1).gather(-1, expected.sources)
        stored, start, arrived = expected.stored, expected.start, arrived + stride
        scores = scores * random(*shape)  # as attention changes them


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds what no result may hold, so that what nobody writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(-99))


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poisoned")
def test_one_launch_per_level_is_token_by_token(case: Case) -> None:
    follow(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case: Case) -> None:
    follow(case, "cuda")


@pytest.mark.gpu
def test_a_hundred_runs_on_a_gpu_are_equal() -> None:
    scores, fresh = torch.rand(8, 8, 4096, device="cuda"), torch.rand(8, 8, 1024, device="cuda")
    rest, options = ((1024,) * 4, (5, 0, 7, 9), 20_000), {"periods": (1, 2, 4, 8), "width": 1024}
    with using("triton"):
        first = cascade_update(scores, fresh, *rest, **options)
        for _ in range(99):
            assert_same(cascade_update(scores, fresh, *rest, **options), first)

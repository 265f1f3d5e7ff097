"""Eviction policies: numbers in, order out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import ConfigError
from kvrag.store.eviction import EVICTION, Use, eviction_named, gdsf, lfu_da, lru


def use(**changes: float) -> Use:
    fields = {"hits": 1, "num_bytes": 100, "cost_seconds": 0.0, "clock": 1, "floor": 0.0} | changes
    return Use(**fields)  # type: ignore[arg-type]


def test_the_least_recently_used_goes_first() -> None:
    assert lru(use(clock=1, hits=9)) < lru(use(clock=2))


def test_the_least_frequently_used_goes_first_whatever_its_size() -> None:
    assert lfu_da(use(hits=1, num_bytes=1, clock=9)) < lfu_da(use(hits=2, num_bytes=900, clock=1))


def test_what_costs_little_per_byte_goes_first() -> None:
    cheap, dear = use(cost_seconds=1.0, num_bytes=1000), use(cost_seconds=1.0, num_bytes=10)
    assert gdsf(cheap) < gdsf(dear)


def test_without_costs_hits_decide() -> None:
    assert gdsf(use(hits=2, num_bytes=10)) == gdsf(use(hits=2, num_bytes=10_000))
    assert gdsf(use(hits=2)) < gdsf(use(hits=3))


@pytest.mark.parametrize("name", ["gdsf", "lfu-da"])
def test_what_is_no_longer_used_is_overtaken(name: str) -> None:
    old = EVICTION[name](use(hits=50, floor=0.0))
    assert old < EVICTION[name](use(hits=1, floor=old))


@pytest.mark.parametrize("name", sorted(EVICTION))
@given(
    hits=st.integers(1, 10**6),
    num_bytes=st.integers(1, 2**50),
    cost=st.floats(0, 1e6),
    clock=st.integers(0, 2**50),
    floor=st.floats(0, 1e12),
)
def test_a_further_use_never_makes_an_entry_go_sooner(
    name: str, hits: int, num_bytes: int, cost: float, clock: int, floor: float
) -> None:
    before = EVICTION[name](Use(hits, num_bytes, cost, clock, floor))
    assert EVICTION[name](Use(hits + 1, num_bytes, cost, clock + 1, floor)) >= before


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="gdsf, lfu-da, lru"):
        eviction_named("fifo")

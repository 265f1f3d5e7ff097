"""What the doctor says of speeds: measured for real, and what follows from given ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.costs import CostTable, PrefillSpeed, Rate
from kvrag.doctor.speeds import break_even, describe_speeds, speeds_of
from kvrag.engine import Engine
from kvrag.speeds import FILE
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny
from kvrag.trial.codecs import CodecScore

CODECS = (CodecScore("raw", 4096.0, 0.0, 1.0), CodecScore("int8", 2100.0, 0.001, 1.0))


def table(disk: Rate, prefill: PrefillSpeed, link: Rate | None = None) -> CostTable:
    return CostTable(prefill, {"disk": disk}, link)


def test_what_is_measured_is_shown_and_kept(tmp_path: Path) -> None:
    tmp_path.joinpath("caches").mkdir()
    with Engine(tiny(), DiskStore(tmp_path / "caches")) as engine:
        report = speeds_of(engine, CODECS)
        assert report is not None
        assert (report.prefill, report.tiers) == (engine.costs.prefill, dict(engine.costs.tiers))
    assert (tmp_path / "caches" / FILE).exists()
    assert [(even.tier, even.codec) for even in report.break_even] == [("disk", "raw"), ("disk", "int8")]
    assert json.loads(json.dumps(asdict(report)))["tiers"]["disk"]["bytes_per_second"] > 0
    lines = list(describe_speeds(report))
    assert max(map(len, lines)) <= 80
    assert sum("tokens/s" in line for line in lines) == 2
    assert sum("MB/s" in line for line in lines) == 1


def test_without_a_folder_loading_is_not_compared() -> None:
    with Engine(tiny()) as engine:
        report = speeds_of(engine, ())
    assert report is not None
    assert not report.break_even
    assert "there is no folder yet" in list(describe_speeds(report))[-1]


def test_given_costs_are_taken_and_unknown_ones_said() -> None:
    given_costs = table(Rate(1e9, 1e-3), PrefillSpeed((64, 0.01), (512, 0.1)), Rate(1e10, 1e-5))
    with Engine(tiny(), costs=given_costs) as engine:
        report = speeds_of(engine, CODECS)
        assert report is not None
        assert report.link == Rate(1e10, 1e-5)
        assert any(line.strip().startswith("link ") for line in describe_speeds(report))
    with Engine(tiny(), costs=CostTable()) as engine:
        assert speeds_of(engine, CODECS) is None


def test_a_disk_that_is_slower_than_the_model_never_pays() -> None:
    fast = PrefillSpeed((100, 1e-3), (1000, 1e-2))
    even = break_even(table(Rate(1e6), fast), fast, "disk", "raw", 4096.0, 10_000)
    assert even.tokens is None
    assert even.load_seconds > even.read_seconds


SPEEDS = st.builds(
    lambda a, b: PrefillSpeed((64, a), (512, 8 * a * b)),
    st.floats(1e-4, 1.0),
    st.floats(0.5, 4.0),
)
RATES = st.builds(Rate, st.floats(1e6, 1e11), st.floats(0, 1e-1))


@given(SPEEDS, RATES, st.none() | RATES, st.floats(1.0, 1e6))
def test_both_sides_of_the_border(prefill: PrefillSpeed, disk: Rate, link: Rate | None, size: float) -> None:
    """Below it reading is at most as slow, from it on loading is: by the engine's own costs."""
    costs, most = table(disk, prefill, link), 1 << 17
    even = break_even(costs, prefill, "disk", "raw", size, most)

    def load(n: int) -> float:
        rates = [disk, *([link] if link else [])]
        return sum(rate.latency + n * size / rate.bytes_per_second for rate in rates)

    last = most if even.tokens is None else even.tokens - 1
    slack = 1 + 1e-6
    for n in {1, last // 2, last} - {0}:
        if n <= last:
            assert prefill.seconds(0, n) <= load(n) * slack
    for n in () if even.tokens is None else (even.tokens, 2 * even.tokens):
        assert load(n) <= prefill.seconds(0, n) * slack
    assert math.isclose(even.load_seconds, load(512), rel_tol=1e-9)


@pytest.mark.parametrize("latency", [0.0, 1e-3])
def test_a_document_of_one_token_can_pay(latency: float) -> None:
    slow = PrefillSpeed((64, 6.4), (512, 51.2))
    even = break_even(table(Rate(1e9, latency), slow), slow, "disk", "raw", 4096.0, 1000)
    assert even.tokens == 1

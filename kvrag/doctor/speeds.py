"""How fast disk, link and model are here, and from how many tokens on loading beats reading anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvrag.costs import CostTable, PrefillSpeed, Rate
from kvrag.engine import Engine
from kvrag.trial.codecs import CodecScore


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From where on a document is loaded faster than it is read anew.

    Attributes:
        tier: where its rows come from.
        codec: how they are written.
        bytes_per_token: in all layers.
        tokens: the shortest document that loads faster; None: none that fits the model's window does.
        load_seconds: what loading the longest document takes that the model's speed was measured on.
        read_seconds: what reading that one anew takes.
    """

    tier: str
    codec: str
    bytes_per_token: float
    tokens: int | None
    load_seconds: float
    read_seconds: float


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """What was measured on this machine, with this model.

    Attributes:
        prefill: two lengths in tokens, and the seconds that reading them took.
        tiers: bytes a second and seconds until they begin to come, by name; empty without a folder.
        link: the same from main memory to the model's device; None: rows are used where they lie.
        break_even: what follows, for each tier and codec.
    """

    prefill: PrefillSpeed
    tiers: dict[str, Rate]
    link: Rate | None
    break_even: tuple[BreakEven, ...] = ()


def speeds_of(engine: Engine, codecs: Sequence[CodecScore]) -> SpeedReport | None:
    """Measure, and keep the result beside the engine's store; None where costs were given and lack a speed.

    Args:
        engine: the model, and a store in whose folder the disk is measured.
        codecs: whose sizes to compare; none: rows as they are.
    """
    table = engine.measure()
    if table.prefill is None:
        return None
    sizes = {score.name: score.bytes_per_token for score in codecs} or {
        "raw": float(engine.model.bytes_per_token)
    }
    found = [
        break_even(table, table.prefill, tier, codec, size, engine.model.max_length)
        for tier in table.tiers
        for codec, size in sizes.items()
    ]
    return SpeedReport(table.prefill, dict(table.tiers), table.link, tuple(found))


def break_even(
    table: CostTable, prefill: PrefillSpeed, tier: str, codec: str, bytes_per_token: float, most: int
) -> BreakEven:
    """The length at which both take the same time, for a document that stands behind nothing.

    Loading n tokens takes `wait + each * n`, reading them `linear * n + quadratic * n^2`: as long as waiting
    takes any time, loading begins as the slower one, and the curves meet once at most. What decoding takes is
    not in it.

    Args:
        table: what things take.
        prefill: the model's speed in it.
        tier: where rows come from.
        codec: how they are written.
        bytes_per_token: of them.
        most: tokens of the model's window.
    """
    rates = [table.tiers[tier], *([table.link] if table.link else [])]
    wait, each = sum(r.latency for r in rates), sum(bytes_per_token / r.bytes_per_second for r in rates)
    gain, bend = prefill.linear - each, prefill.quadratic
    root = math.sqrt(gain * gain + 4 * bend * wait)
    length = math.inf
    if gain > 0:
        length = 2 * wait / (gain + root)
    elif bend > 0:
        length = (root - gain) / (2 * bend)
    tokens = max(1, math.ceil(length)) if length < most else None
    longest = prefill.long[0]
    return BreakEven(tier, codec, bytes_per_token, tokens, wait + each * longest, prefill.seconds(0, longest))


def describe_speeds(report: SpeedReport) -> Iterator[str]:
    """The report as lines."""
    yield "speeds, measured on this machine"
    for length, seconds in (report.prefill.short, report.prefill.long):
        yield f"  reading {length:>5} tokens     {length / seconds:>12,.0f} tokens/s"
    for name, rate in [*report.tiers.items(), *([("link", report.link)] if report.link else [])]:
        yield (f"  {name:<18}  {rate.bytes_per_second / 1e6:>12,.0f} MB/s, after {rate.latency * 1e3:.2f} ms")
    if not report.break_even:
        yield "  there is no folder yet to measure the disk in, so loading is not compared"
        return
    longest = report.prefill.long[0]
    yield "a document is loaded faster than it is read anew"
    yield f"  {'from':<10}{'codec':<8}{'if it has':>20}  {f'{longest} tokens: loaded':>20}  {'read anew':>10}"
    for even in report.break_even:
        when = "never" if even.tokens is None else f"{even.tokens:,} tokens or more"
        yield (
            f"  {even.tier:<10}{even.codec:<8}{when:>20}  {even.load_seconds * 1e3:>17.1f} ms"
            f"  {even.read_seconds * 1e3:>7.1f} ms"
        )

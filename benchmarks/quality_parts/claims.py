"""Which published claims, and which goals of ours, hold in what `benchmarks/quality.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quality_parts.policies import FULL, NEAR, PLAIN
from quality_parts.summary import ALL, rows_of

# Cells of fewer questions say nothing and are not shown.
LEAST = 15

CACHEFOCUS, FOCUSED = "keep .5, sort", "keep 2, best layer"
HEATED = "keep 2, best layer, heats"
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"

Cell = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, and what became of it.

    Attributes:
        claim: in words.
        source: who says so.
        verdict: `HOLDS`, `FAILS`, or `OPEN` where the interval has both.
        evidence: the figures.
    """

    claim: str
    source: str
    verdict: str
    evidence: str


class Measured:
    """The tables, and which numbers of documents lie inside and beyond the window."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Take the figures of docs/data/quality.json."""
        self.data = data
        cells = (c for c in rows_of(data["cells"]) if c["asked"] >= LEAST)
        self.cells = {(c["policy"], c["documents"], c["kind"]): c for c in cells}
        self.contexts = {c["documents"]: c for c in rows_of(data["contexts"])}
        self.ttft = {(c["policy"], c["documents"]): c for c in rows_of(data["ttft"])}
        self.families: dict[str, str] = data["families"]
        self.inside = [n for n, c in self.contexts.items() if c["fit"] >= 0.95]
        self.beyond = [n for n, c in self.contexts.items() if c["fit"] <= 0.05]

    def cell(self, policy: str, num: int, kind: str) -> Cell | None:
        """One cell of the comparison."""
        return self.cells.get((policy, num, kind))

    def times_window(self, num: int) -> float:
        """Length of so many documents, in windows."""
        return float(self.contexts[num]["tokens"] / self.data["conditions"]["window"])


def share(cell: Cell) -> float:
    """Exact match of a cell."""
    return float(cell["right"] / cell["asked"])


def fall(before: Cell, after: Cell) -> tuple[float, float, float]:
    """How much smaller the second share is, with Newcombe's 95 % interval of two independent samples."""
    p, q = share(before), share(after)
    low = p - q - math.hypot(p - before["low"], after["high"] - q)
    return p - q, low, p - q + math.hypot(before["high"] - p, q - after["low"])


def below(low: float, high: float, limit: float) -> str:
    """Whether a quantity lies below a limit, as far as its interval tells."""
    return HOLDS if high < limit else FAILS if low > limit else OPEN


def above(low: float, high: float, limit: float) -> str:
    """Whether a quantity lies above a limit."""
    return below(-high, -low, -limit)


def joined(verdicts: Sequence[str]) -> str:
    """What has to hold everywhere fails if it fails somewhere."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else OPEN


def points(value: float, low: float, high: float) -> str:
    """A difference of shares with its interval, in points."""
    return f"{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def verdicts(measured: Measured) -> list[Verdict]:
    """All claims that the figures can judge."""
    found = [*_beyond(measured), *_inside(measured), *_pruning(measured), *_latency(measured)]
    return found + _goals(measured)


def _beyond(m: Measured) -> Iterator[Verdict]:
    if not m.inside or not m.beyond:
        return
    inside, most = max(m.inside), max(m.beyond)
    far = f"{most} documents, {m.times_window(most):.1f} windows"
    for policy, claim in (
        (FULL, "full attention falls off beyond the window"),
        (PLAIN, "re-positioned caches that share positions stay level (under 2 points)"),
        (CACHEFOCUS, "CacheFocus, half of the units kept, stays level (under 2 points)"),
        (FOCUSED, "CacheFocus with the best layer, two units kept, stays level (under 2 points)"),
        (HEATED, "the same with heats beyond the window stays level (under 2 points)"),
        (NEAR, "the best layer times the search's similarity, in heats, stays level (under 2 points)"),
    ):
        num = max((n for n in m.beyond if m.cell(policy, n, "one")), default=most)
        before, after = m.cell(policy, inside, "one"), m.cell(policy, num, "one")
        if not before or not after:
            continue
        drop, low, high = fall(before, after)
        verdict = above(low, high, 0.02) if policy == FULL else below(low, high, 0.02)
        evidence = (
            f"one-document questions, {inside} to {far if num == most else f'{num} documents'}: "
            f"{100 * share(before):.1f} to {100 * share(after):.1f} %, a fall of {points(drop, low, high)}"
        )
        yield Verdict(claim, "ours" if policy in (PLAIN, HEATED, NEAR) else "CacheFocus", verdict, evidence)


def _inside(m: Measured) -> Iterator[Verdict]:
    nums = [n for n in m.inside if n > 1 and m.cell(PLAIN, n, ALL)]
    if nums:
        cell = m.cells[PLAIN, max(nums), ALL]
        yield Verdict(
            "reuse without repair costs quality inside the window (over 1 point)",
            "FusionRAG",
            above(cell["lost_low"], cell["lost_high"], 0.01),
            f"all kinds, {max(nums)} documents: "
            f"{points(cell['lost'], cell['lost_low'], cell['lost_high'])} lost",
        )


def _pruning(m: Measured) -> Iterator[Verdict]:
    whole = [n for n in m.beyond if m.cell(PLAIN, n, ALL)]
    for policy in (CACHEFOCUS, FOCUSED):
        found, words = [], []
        for num in (n for n in (max(m.inside, default=0), max(whole, default=0)) if n):
            if cell := m.cell(policy, num, ALL):
                low, high = cell["gained_low"], cell["gained_high"]
                found.append(HOLDS if low > -0.01 else FAILS if high < 0 else OPEN)
                words.append(f"{num} documents: {points(cell['gained'], low, high)}")
        if found:
            claim = f"pruning costs nothing or helps ({policy}; all kinds, against none)"
            yield Verdict(claim, "CacheFocus", joined(found), "; ".join(words))
    num = max(m.beyond or m.inside, default=0)
    for control in ("random", "rank"):
        ours, other = m.cell(CACHEFOCUS, num, "one"), m.cell(f"keep .5, {control}", num, "one")
        if ours and other:
            gain, low, high = fall(ours, other)
            yield Verdict(
                f"attention chooses better whom to keep than {control}",
                "control",
                above(low, high, 0.0),
                f"half kept, one-document questions, {num} documents: {points(gain, low, high)}",
            )


def _latency(m: Measured) -> Iterator[Verdict]:
    known = [n for n in m.contexts if m.ttft.get((CACHEFOCUS, n), {}).get("of_full")]
    if not known:
        return
    num = min(known, key=lambda n: abs(m.contexts[n]["tokens"] - 4096))
    less = 1 - m.ttft[CACHEFOCUS, num]["of_full"]
    yield Verdict(
        "time to first token falls by 47 % at about 4K tokens",
        "CacheFocus",
        HOLDS if less >= 0.47 else FAILS,
        f"{num} documents, {m.contexts[num]['tokens']:.0f} tokens: by {less:.0%}, rows in memory",
    )


def _goals(m: Measured) -> list[Verdict]:
    nums = [n for n in m.inside if n > 1]
    repairs = [
        policy
        for policy, family in m.families.items()
        if family in ("repair", "offline") and all(_affordable(m.cell(policy, n, ALL)) for n in nums)
    ]
    if not nums or not repairs:
        return []
    best = min(repairs, key=lambda policy: sum(m.cells[policy, n, ALL]["lost"] for n in nums))
    cells = [m.cells[best, n, ALL] for n in nums]
    lost = (
        f"{n}: {points(c['lost'], c['lost_low'], c['lost_high'])}" for n, c in zip(nums, cells, strict=True)
    )
    same = (f"{n}: {100 * c['same']:.1f} %" for n, c in zip(nums, cells, strict=True))
    chosen = f"{best}, the best repair here of those within 15 %; documents"
    return [
        Verdict(
            "inside the window at most 1 point below full attention, 15 % read again",
            "goal",
            joined([below(c["lost_low"], c["lost_high"], 0.01) for c in cells]),
            f"{chosen} {'; '.join(lost)}",
        ),
        Verdict(
            "inside the window at least 95 % of answers unchanged",
            "goal",
            joined([above(c["same_low"], c["same_high"], 0.95) for c in cells]),
            f"{chosen} {'; '.join(same)}",
        ),
    ]


def _affordable(cell: Cell | None) -> bool:
    """At most 15 % read again; a share that was rounded to whole rows may be a little more."""
    return cell is not None and cell["recomputed"] < 0.155 and cell["same"] is not None

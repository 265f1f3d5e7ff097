"""Which claims and goals hold in what `benchmarks/memory.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from memory_parts.entries import FOUND, FULL, GIVEN, NOTHING, SALIENT, SLOW, WINDOW
from memory_parts.summary import rows_of
from quality_parts.claims import FAILS, HOLDS, OPEN, Verdict, above, below, joined, points

PAPERS = ("Cascading KV cache", "LaCache")
# Fewer questions say nothing.
LEAST = 40
Cell = dict[str, Any]


class Measured:
    """The tables, by what tells their rows."""

    def __init__(self, data: dict[str, Any], times: dict[str, Any] | None = None) -> None:
        """Take docs/data/memory.json and, if it was measured, memory-time.json."""
        self.data, self.times = data, times
        self.budget: int = data["conditions"]["budget"]
        self.families: dict[str, str] = data["families"]
        self.facts = self._cells("facts", "distance")
        self.passkeys = self._cells("passkeys", "times")
        self.texts = {(t["policy"], t["budget"], t["text"], t["first"]): t for t in rows_of(data["text"])}
        self.gaps = {(g["policy"], g["budget"], g["text"], g["against"]): g for g in rows_of(data["gaps"])}
        self.against = {
            (a["task"], a["budget"], a["cell"], a["policy"], a["other"]): a
            for a in rows_of(data["against"])
            if a["asked"] >= LEAST
        }

    def _cells(self, name: str, column: str) -> dict[tuple[Any, ...], Cell]:
        return {
            (c["policy"], c["budget"], c["room"], c["back"], c[column]): c
            for c in rows_of(self.data[name])
            if c["asked"] >= LEAST
        }

    def of_papers(self) -> list[str]:
        """Policies as the two papers have them."""
        return [name for name, family in self.families.items() if family in PAPERS]


def share(cell: Cell) -> float:
    """Of right answers."""
    return float(cell["right"] / cell["asked"])


def percent(cell: Cell) -> str:
    """A share with its interval."""
    return f"{100 * share(cell):.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def verdicts(m: Measured) -> list[Verdict]:
    """All that the figures can judge."""
    return [*_cascade(m), *_ladder(m), *_combined(m), *_ours(m), *_archive(m), *_time(m)]


def _cascade(m: Measured) -> Iterator[Verdict]:
    cells = {
        name: m.against.get(("passkey", m.budget, 16, name, WINDOW))
        for name in m.of_papers()
        if name.startswith("cascade")
    }
    found = {name: cell for name, cell in cells.items() if cell}
    if found:
        best = max(found, key=lambda name: found[name]["gain"])
        cell = found[best]
        held = m.passkeys[best, m.budget, 0, NOTHING, 16]
        yield Verdict(
            "a cascade keeps a passkey over four doublings of its budget, 24 points ahead of the window",
            "Cascading KV cache",
            above(cell["low"], cell["high"], 0.24),
            f"passkeys at 16 budgets, the best of them ({best}): {percent(held)}; ahead of the window by "
            f"{points(cell['gain'], cell['low'], cell['high'])}",
        )
    for claim, against, limit in (
        ("a cascade's perplexity at half the budget is within 10 % of full attention's", FULL, math.log(1.1)),
        ("a cascade's perplexity at half the budget is lower than the window's", WINDOW, 0.0),
    ):
        yield from _perplexity(m, "Cascading KV cache", "cascade 8", claim, against, limit)
    chosen = [
        m.against.get(("near", m.budget, distance, "cascade 4", "cascade 4, random scores"))
        for distance in (128, 256, 512)
    ]
    if all(chosen):
        words = (f"{c['cell']:g} tokens ago: {points(c['gain'], c['low'], c['high'])}" for c in chosen if c)
        yield Verdict(
            "attention chooses better than chance which tokens a cascade keeps",
            "control",
            joined([above(c["low"], c["high"], 0.0) for c in chosen if c]),
            "; ".join(words),
        )


def _ladder(m: Measured) -> Iterator[Verdict]:
    for claim, against, limit in (
        ("a ladder's perplexity at half the budget is within 10 % of full attention's", FULL, math.log(1.1)),
        ("a ladder's perplexity at half the budget is lower than the window's", WINDOW, 0.0),
    ):
        yield from _perplexity(m, "LaCache", "ladder 1/2", claim, against, limit)


def _perplexity(
    m: Measured, source: str, policy: str, claim: str, against: str, limit: float
) -> Iterator[Verdict]:
    """A claim about the mean loss against another policy's, for either kind of text."""
    for text in ("chat", "documents"):
        if gap := m.gaps.get((policy, 4 * m.budget, text, against)):
            middle, low, high = (math.expm1(gap[name]) for name in ("gap", "low", "high"))
            yield Verdict(
                claim,
                source,
                below(gap["low"], gap["high"], limit),
                f"{policy}, {text}, budget {4 * m.budget}, tokens {4 * m.budget} to {8 * m.budget}: "
                f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]",
            )


def _combined(m: Measured) -> Iterator[Verdict]:
    for other in ("cascade 4", "ladder 1/2"):
        cells = [
            m.against.get(("near", m.budget, distance, "combined 4, bonus 1", other))
            for distance in (128, 256, 512, 1024)
        ]
        if all(cells):
            words = (f"{c['cell']:g}: {points(c['gain'], c['low'], c['high'])}" for c in cells if c)
            yield Verdict(
                f"a ladder over a cascade keeps more facts than {other}",
                "ours",
                joined([above(c["low"], c["high"], 0.0) for c in cells if c]),
                f"tokens ago; {'; '.join(words)}",
            )


def _ours(m: Measured) -> Iterator[Verdict]:
    """The goal: better than all that the papers have, everywhere that anything is left to be won."""
    for task, policy, cells, unit in (
        ("near", SALIENT, (256, 512, 1024), "tokens ago"),
        ("passkey", SLOW, (4, 8, 16), "budgets"),
    ):
        verdict, words = [], []
        for cell in cells:
            gains = [m.against.get((task, m.budget, cell, policy, name)) for name in m.of_papers()]
            known = [gain for gain in gains if gain]
            if known:
                worst = min(known, key=lambda gain: gain["low"])
                verdict.append(above(worst["low"], worst["high"], 0.0))
                words.append(
                    f"{cell}: {points(worst['gain'], worst['low'], worst['high'])} over {worst['other']}"
                )
        if verdict:
            what = "facts" if task == "near" else "passkeys"
            yield Verdict(
                f"{policy} keeps more {what} than every cascade and ladder",
                "goal",
                joined(verdict),
                f"{unit}; {'; '.join(words)}",
            )


def _archive(m: Measured) -> Iterator[Verdict]:
    room, far = m.budget // 4, 100 * m.budget
    for back, claim in (
        (FOUND, "with the archive, facts told 100 budgets ago are recalled in over 95 % of cases"),
        (GIVEN, "the same if the right message is always found"),
    ):
        cells = {
            name: cell for name in m.families if (cell := m.facts.get((name, m.budget, room, back, far)))
        }
        if cells:
            best = max(cells, key=lambda name: share(cells[name]))
            cell = cells[best]
            yield Verdict(
                claim,
                "goal" if back == FOUND else "control",
                above(cell["low"], cell["high"], 0.95),
                f"{far:,} tokens, {best}: {percent(cell)} of {cell['asked']}",
            )


def _time(m: Measured) -> Iterator[Verdict]:
    if m.times is None:
        return
    exponents = m.times["exponents"]
    strided = [exponents[name] for name in ("window", "cascade 4") if exponents.get(name)]
    if strided:
        worst = max(strided)
        yield Verdict(
            "reading in strides takes time in proportion to the length",
            "Cascading KV cache",
            HOLDS if worst < 1.1 else FAILS if worst > 1.3 else OPEN,
            ", ".join(
                f"{name}: length to the power of {value}" for name, value in exponents.items() if value
            ),
        )

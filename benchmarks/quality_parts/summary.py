"""Sums up the records of `benchmarks/quality.py`: shares with 95 % intervals, paired differences, AUCs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from quality_parts.contexts import KINDS, RANKS, kinds_of
from quality_parts.policies import FULL, PLAIN

Z = 1.959964
ALL = "all"
SIGNALS = ("entropy", "others", "doubt")
CELL = ("policy", "documents", "kind", "asked", "right", "low", "high", "same", "same_low", "same_high")
LOST = ("lost", "lost_low", "lost_high", "gained", "gained_low", "gained_high", "recomputed")

Record = dict[str, Any]


def wilson(good: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); the whole range if nothing was asked.

    >>> [round(x, 3) for x in wilson(95, 100)]
    [0.888, 0.978]
    """
    if not asked:
        return 0.0, 1.0
    share, z2 = good / asked, Z * Z / asked
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked))
    # Rounding must not leave the share itself outside.
    return max(0.0, min(share, (middle - half) / (1 + z2))), min(1.0, max(share, (middle + half) / (1 + z2)))


def paired(better: int, worse: int, asked: int) -> tuple[float, float, float]:
    """Difference of two shares of the same questions, and its 95 % interval (Agresti and Min 2005).

    Args:
        better: questions that only the first answered.
        worse: questions that only the second answered.
        asked: all questions.
    """
    if not asked:
        return 0.0, -1.0, 1.0
    middle, total = (better - worse) / (asked + 2), asked + 2
    half = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / total) / total
    return (better - worse) / asked, middle - half, middle + half


def auc(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, float, float] | None:
    """Chance that a positive case has the larger signal, ties counting half, and its 95 % interval.

    The interval is that of Hanley and McNeil (1982). None without cases of either kind.

    >>> auc([3, 2], [1, 2])[0]
    0.875
    """
    if not positive or not negative:
        return None
    ranks, m, n = _mid_ranks([*positive, *negative]), len(positive), len(negative)
    area = (sum(ranks[:m]) - m * (m + 1) / 2) / (m * n)
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (m - 1) * (q1 - area * area) + (n - 1) * (q2 - area * area)
    half = Z * math.sqrt(max(0.0, variance) / (m * n))
    return area, max(0.0, area - half), min(1.0, area + half)


def _mid_ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; equal ones share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end + 1) / 2
        start = end
    return ranks


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Tables of everything that was measured, each as column names and rows."""
    fullest_first = sorted(records, key=lambda record: -len(record["answers"]))  # it has the order of all
    policies = list(dict.fromkeys(name for record in fullest_first for name in record["answers"]))
    return {
        "contexts": _table(("documents", "asked", "units", "tokens", "fit"), _contexts(records)),
        "cells": _table(CELL + LOST, _cells(records, policies)),
        "ranks": _table(("policy", "documents", "kind", "rank", *CELL[3:7]), _ranks(records, policies)),
        "best_unit": _table(("documents", "kind", "variant", "asked", "by_layer"), _best(records)),
        "risk": _table(("where", "what", "signal", "asked", "bad", "auc", "low", "high"), _risk(records)),
        "ttft": _table(("policy", "documents", "median_ms", "of_full"), _ttft(records, policies)),
    }


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    return {"columns": list(columns), "rows": [[_short(value) for value in row] for row in rows]}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def rows_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table with their column names."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _by(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by values of some of their fields, sorted."""
    found: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        found[tuple(record[name] for name in names)].append(record)
    return dict(sorted(found.items()))


def _with_all(records: Sequence[Record]) -> Iterable[tuple[int, str, list[Record]]]:
    """Records by number of documents and kind, and all kinds together where all were asked."""
    for (num,), some in _by(records, "documents").items():
        kinds = _by(some, "kind")
        for kind in KINDS:
            if (kind,) in kinds:
                yield num, kind, kinds[(kind,)]
        if len(kinds) == len(kinds_of(num)):
            yield num, ALL, some


def _even(records: Sequence[Record], num: int, kind: str) -> Sequence[Record]:
    """Of all kinds together those of turns with every kind, so that each weighs as much as the others."""
    if kind != ALL:
        return records
    turns = _by(records, "seed", "turn").values()
    return [record for turn in turns if len(turn) == len(kinds_of(num)) for record in turn]


def _answered(records: Sequence[Record], policy: str, num: int, kind: str) -> Sequence[Record]:
    """Records with a policy's answer."""
    return _even([record for record in records if policy in record["answers"]], num, kind)


def _contexts(records: Sequence[Record]) -> Iterable[Sequence[Any]]:
    for (num,), some in _by(records, "documents").items():
        kinds = _by(some, "kind").values()
        yield (
            num,
            min(map(len, kinds)),
            fmean(r["units"] for r in some),
            fmean(r["tokens"] for r in some),
            fmean(r["fits"] for r in some),
        )


def _cells(records: Sequence[Record], policies: Sequence[str]) -> Iterable[Sequence[Any]]:
    for num, kind, some in _with_all(records):
        for policy in policies:
            here = _answered(some, policy, num, kind)
            if not here:
                continue
            right, read = _right(here, policy), [r for r in here if FULL in r["answers"]]
            same = sum(r["answers"][policy][1] for r in read)
            again = fmean(r["answers"][policy][3] / r["tokens"] for r in here)
            yield (
                *(policy, num, kind, len(here), right, *wilson(right, len(here))),
                *((same / len(read)) if read else None, *wilson(same, len(read))),
                *_against(read, FULL, policy),
                *_against([r for r in here if PLAIN in r["answers"]], policy, PLAIN),
                again,
            )


def _right(records: Iterable[Record], policy: str) -> int:
    return sum(record["answers"][policy][0] for record in records)


def _against(records: Sequence[Record], first: str, second: str) -> tuple[float, float, float]:
    """How much larger the first one's share of right answers is."""
    pairs = [(r["answers"][first][0], r["answers"][second][0]) for r in records]
    return paired(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs), len(pairs))


def _ranks(records: Sequence[Record], policies: Sequence[str]) -> Iterable[Sequence[Any]]:
    for num, kind, some in _with_all(records):
        if num == 1 or kind not in ("one", ALL):
            continue
        for policy in policies:
            by_rank = _by(_answered(some, policy, num, kind), "rank")
            for rank in RANKS:
                if here := by_rank.get((rank,)):
                    right = _right(here, policy)
                    yield policy, num, kind, rank, len(here), right, *wilson(right, len(here))


def _best(records: Sequence[Record]) -> Iterable[Sequence[Any]]:
    for num, kind, some in _with_all(records):
        here = [r["best"] for r in _even([r for r in some if "best" in r], num, kind)]
        for variant in range(len(here[0]) if here else 0):
            by_layer = [fmean(hits) for hits in zip(*(best[variant] for best in here), strict=True)]
            yield num, kind, variant, len(here), by_layer


def _risk(records: Sequence[Record]) -> Iterable[Sequence[Any]]:
    known = [r for r in records if "risk" in r]
    for where, fits in (("inside the window", True), ("beyond the window", False)):
        some = [r for r in known if r["fits"] == fits]
        # Beyond the window full attention itself fails: there, what counts is whether an answer is right.
        for what, place in (("differs", 1), ("wrong", 0)):
            judged = [r for r in some if place == 0 or FULL in r["answers"]]
            for i, signal in enumerate(SIGNALS):
                bad = [r["risk"][i] for r in judged if not r["answers"][PLAIN][place]]
                good = [r["risk"][i] for r in judged if r["answers"][PLAIN][place]]
                yield where, what, signal, len(judged), len(bad), *(auc(bad, good) or (None, None, None))


def _ttft(records: Sequence[Record], policies: Sequence[str]) -> Iterable[Sequence[Any]]:
    records = [r for r in records if r.get("timed")] or records
    for (num,), some in _by(records, "documents").items():
        full = _times(some, FULL)
        for policy in policies:
            if times := _times(some, policy):
                yield policy, num, median(times), median(times) / median(full) if full else None


def _times(records: Iterable[Record], policy: str) -> list[float]:
    """Milliseconds, where they were written down."""
    answers = (r["answers"][policy] for r in records if policy in r["answers"])
    return [answer[2] for answer in answers if answer[2] is not None]

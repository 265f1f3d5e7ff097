"""From records to tables: shares with intervals, losses, differences of policies on the same questions."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from memory_parts.entries import BY_NAME, FOUND, FULL, NOTHING, SALIENT, WINDOW
from memory_parts.units import BINS, CHAT, DOCUMENTS, FAR, NEAR, PASSKEY
from quality_parts.summary import Z, paired, wilson

Record = dict[str, Any]
Table = dict[str, Any]

FACTS = ("policy", "budget", "room", "back", "distance", "asked", "right", "low", "high", "kept")
PASSKEYS = (*FACTS[:4], "times", *FACTS[5:], "digits_right", "digits")
TEXT = ("policy", "budget", "text", "first", "end", "tokens", "loss", "values", "value_loss")
GAPS = ("policy", "budget", "text", "against", "streams", "gap", "low", "high")
AGAINST = ("task", "budget", "cell", "policy", "other", "asked", "gain", "low", "high")


def summary(records: Sequence[Record]) -> dict[str, Table]:
    """All tables."""
    return {
        "families": {name: entry.family for name, entry in BY_NAME.items()},
        "facts": _table(FACTS, _cells([r for r in records if r["task"] in (NEAR, FAR)])),
        "passkeys": _table(PASSKEYS, _cells(_shared(records), digits=True)),
        "text": _table(TEXT, _texts(records)),
        "gaps": _table(GAPS, _gaps(records)),
        "against": _table(AGAINST, _against(records)),
    }


def rows_of(table: Table) -> list[dict[str, Any]]:
    """Rows of a table with their column names."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _shared(records: Sequence[Record]) -> list[Record]:
    """Passkeys at depths that all policies have been asked at, those with few depths so far left aside."""
    some = [r for r in records if r["task"] == PASSKEY]
    kept: list[Record] = []
    for room in {r["room"] for r in some}:
        depths: dict[str, set[int]] = defaultdict(set)
        for record in some:
            if record["room"] == room:
                depths[record["policy"]].add(record["batch"])
        most = max(map(len, depths.values()))
        shared = set.intersection(*(found for found in depths.values() if 2 * len(found) > most))
        kept += [r for r in some if r["room"] == room and r["batch"] in shared]
    return kept


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    return {
        "columns": list(columns),
        "rows": [[round(x, 5) if isinstance(x, float) else x for x in row] for row in rows],
    }


def _order(record: Record) -> tuple[int, int, int]:
    return list(BY_NAME).index(record["policy"]), record["budget"], record["room"]


def _grouped(records: Sequence[Record], *names: str) -> Iterator[tuple[tuple[Any, ...], list[Record]]]:
    found: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=_order):
        found[tuple(record[name] for name in names)].append(record)
    yield from found.items()


def _cells(records: Sequence[Record], *, digits: bool = False) -> Iterator[Sequence[Any]]:
    for key, some in _grouped(records, "policy", "budget", "room"):
        rows = [row for record in some for row in record["results"]]
        for back in rows[0][3]:
            for cell in sorted({row[0] for row in rows}):
                here = [row for row in rows if row[0] == cell]
                answers = [row[3][back] for row in here]
                right = sum(answer[0] for answer in answers)
                shares = (len(here), right, *wilson(right, len(here)), fmean(row[2] for row in here))
                more = [sum(a[1] for a in answers), sum(a[2] for a in answers)] if digits else []
                yield (*key, back, cell, *shares, *more)


def _texts(records: Sequence[Record]) -> Iterator[Sequence[Any]]:
    some = [r for r in records if r["task"] in (CHAT, DOCUMENTS)]
    for (policy, budget, text), group in _grouped(some, "policy", "budget", "task"):
        streams = [stream for record in group for stream in record["results"]]
        for i, (first, end) in enumerate(itertools.pairwise(BINS)):
            loss, tokens, value_loss, values = (sum(s[i][j] for s in streams) for j in range(4))
            if tokens:
                value_loss /= max(1, values)
                yield policy, budget, text, first, end, tokens, loss / tokens, values, value_loss


def mean_loss(stream: Sequence[Sequence[float]], budget: int) -> float | None:
    """Of the tokens from where the budget may be exceeded; None: there are none."""
    bins = [i for i, first in enumerate(BINS[:-1]) if first >= budget and stream[i][1]]
    return sum(stream[i][0] for i in bins) / sum(stream[i][1] for i in bins) if bins else None


def _gaps(records: Sequence[Record]) -> Iterator[Sequence[Any]]:
    """Differences of mean loss to full attention and to the window, stream by stream."""
    some = [r for r in records if r["task"] in (CHAT, DOCUMENTS)]
    by_key = {(r["policy"], r["budget"], r["task"], r["batch"]): r["results"] for r in some}
    for (policy, budget, text), group in _grouped(some, "policy", "budget", "task"):
        for against in (FULL, WINDOW):
            pairs = (
                (mean_loss(mine, budget), mean_loss(other, budget))
                for r in group
                if (others := by_key.get((against, budget, text, r["batch"])))
                for mine, other in zip(r["results"], others, strict=True)
            )
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            if policy != against and len(differences) > 1:
                middle = fmean(differences)
                half = Z * stdev(differences) / math.sqrt(len(differences))
                yield policy, budget, text, against, len(differences), middle, middle - half, middle + half


def _against(records: Sequence[Record]) -> Iterator[Sequence[Any]]:
    """How many more questions one policy answers than another, on the same questions, without an archive."""
    some = [r for r in records if r["task"] in (NEAR, PASSKEY) and not r["room"]]
    by_key = {(r["task"], r["budget"], r["policy"], r["batch"]): r["results"] for r in some}
    names = [name for name in BY_NAME if name != FULL]
    for task, budget in sorted({(r["task"], r["budget"]) for r in some}):
        for policy, other in ((a, b) for a in names for b in names if a != b):
            pairs: dict[float, list[tuple[int, int]]] = defaultdict(list)
            for batch in {r["batch"] for r in some}:
                mine, theirs = (by_key.get((task, budget, name, batch)) for name in (policy, other))
                for row, row2 in zip(mine, theirs, strict=True) if mine and theirs else ():
                    pairs[row[0]].append((row[3][NOTHING][0], row2[3][NOTHING][0]))
            for cell, found in sorted(pairs.items()):
                better, worse = sum(a > b for a, b in found), sum(a < b for a, b in found)
                yield task, budget, cell, policy, other, len(found), *paired(better, worse, len(found))


def printed(data: dict[str, Any]) -> str:
    """Shares and losses, for the terminal."""
    lines = [", ".join(f"{k}={v}" for k, v in data["conditions"].items())]
    for name, column in (("facts", "distance"), ("passkeys", "times")):
        cells = rows_of(data[name])
        found: dict[tuple[Any, ...], dict[float, dict[str, Any]]] = defaultdict(dict)
        for cell in cells:
            found[tuple(cell[k] for k in FACTS[:4])][cell[column]] = cell
        columns = sorted({cell[column] for cell in cells})
        lines += ["", f"{name:<52}" + "".join(f"{c:>9}" for c in columns)]
        for key, row in found.items():
            title = f"{key[0]}, {key[1]}" + (f" of it {key[2]} for {key[3]}" if key[2] else "")
            shown = (row.get(c) for c in columns)
            lines.append(
                f"{title:<52}" + "".join(f"{c['right'] / c['asked']:>9.3f}" if c else " " * 9 for c in shown)
            )
    for gap in rows_of(data["gaps"]):
        words = f"{gap['policy']}, {gap['budget']}, {gap['text']}, against {gap['against']}"
        lines.append(f"{words:<60}{gap['gap']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    return "\n".join(lines)


__all__ = ["FOUND", "SALIENT", "mean_loss", "printed", "rows_of", "summary"]

"""Writes docs/quality.md from docs/data/quality.json, for `benchmarks/report.py`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from quality_parts.claims import CACHEFOCUS, FOCUSED, Measured, share, verdicts
from quality_parts.contexts import KINDS, RANKS
from quality_parts.policies import FULL, PLAIN, TRUNCATED
from quality_parts.summary import ALL, rows_of

_KINDS = {
    "one": "One-document questions",
    "crossing": "Chunk-crossing questions: the fact stands in a part that does not say whom it is about",
    "two_hop": "Two-hop questions",
    "compare": "Comparisons of two documents",
}
_REPAIRED = "query-driven .15, best layers"


def lines(data: dict[str, Any], real: dict[str, Any] | None = None) -> list[str]:
    """The page.

    Args:
        data: of docs/data/quality.json.
        real: of docs/data/real_text.json; None: not measured.
    """
    m = Measured(data)
    return [
        "# Quality",
        "",
        "<!-- written by benchmarks/report.py from docs/data/quality.json; do not edit -->",
        "",
        *_how(m),
        *_claims(m),
        *(line for kind in KINDS for line in _kind(m, kind)),
        *_lost(m),
        *_ranks(m),
        *_best_unit(m),
        *_risk(m),
        *_ttft(m),
        *(_real(real) if real else []),
    ]


def _how(m: Measured) -> list[str]:
    made, chosen = m.data["conditions"], m.data["calibration"]["chosen"]
    asked = sorted({c["asked"] for c in m.contexts.values()})
    contexts = (
        f"{n} ({c['units']:.0f} parts, {c['tokens']:,.0f} tokens)" for n, c in sorted(m.contexts.items())
    )
    turns = " to ".join(str(n) for n in dict.fromkeys((asked[0], asked[-1])))
    return [
        *_prose(
            f"`{made['model']}`, {made['parameters'] / 1e6:.1f}M parameters, {made['layers']}",
            "layers, trained",
            f"on up to {made['window']} positions, asked about names that it was not trained on. An answer",
            "counts if it is right to the last token. Documents have one to three parts; the part is what is",
            f"encoded apart. All policies answer the same questions: {turns} of each kind and number of",
            f"documents{_thin(m)}.",
        ),
        *_prose(
            f"Documents: {', '.join(contexts)}. The document with the answer stands first, in the",
            "middle, last",
            "and anywhere, in turn. It is the one of its context that serves most kinds of",
            "questions, so it has",
            "later parts more often than others.",
        ),
        *_prose(
            f"{made['device']}, {made['threads']} thread, {made['dtype']}, torch {made['torch']},",
            f"transformers {made['transformers']}, Python {made['python']}, {made['date']}; seeds",
            f"{', '.join(map(str, made['seeds']))}; weights {made['weights']}; load of the machine",
            "at the end",
            f"{made['load'][0]}. Policies are named in `benchmarks/quality_parts/policies.py`. Layers",
            "were chosen on",
            f"{m.data['calibration']['asked']} other questions: best layer:",
            f"{chosen['best layer']}; best pair:",
            f"{chosen['best pair']}; for repair: {chosen['best layers for repair']}.",
        ),
    ]


def _thin(m: Measured) -> str:
    """Where some policies answered fewer questions than others."""
    fewer: dict[int, int] = {}
    for (_, num, kind), cell in m.cells.items():
        if kind != ALL and cell["asked"] < m.contexts[num]["asked"]:
            fewer[num] = min(cell["asked"], fewer.get(num, cell["asked"]))
    if not fewer:
        return ""
    return "; some only " + ", ".join(f"{asked} at {num}" for num, asked in fewer.items())


def _claims(m: Measured) -> list[str]:
    return [
        "## What holds on this model",
        "",
        *_prose(
            "Computed from the figures: a claim holds or does not where its whole 95 % interval",
            "says so, and is",
            "not decided otherwise.",
        ),
        *_table(
            ("claim", "of", "", "figures"),
            [(v.claim, v.source, f"**{v.verdict}**", v.evidence) for v in verdicts(m)],
            numbers=0,
        ),
    ]


def _kind(m: Measured, kind: str) -> list[str]:
    nums = [n for n in m.contexts if m.cell(TRUNCATED, n, kind)]
    if not nums:
        return []
    widest = max(c["high"] - c["low"] for (_, _, k), c in m.cells.items() if k == kind)
    rows = []
    for policy in m.families:
        cells = [m.cell(policy, n, kind) for n in nums]
        if any(cells):
            rows.append((policy, m.families[policy], *(f"{100 * share(c):.1f}" if c else "" for c in cells)))
    return [
        f"## {_KINDS[kind]}",
        "",
        f"![exact match by number of documents](img/quality-{kind}.svg)",
        "",
        *_prose(
            "Exact match in percent by number of documents; 95 % intervals reach at most about",
            f"{50 * widest:.1f} points to either side.",
        ),
        *_table(("policy", "family", *map(str, nums)), rows, numbers=len(nums)),
    ]


def _lost(m: Measured) -> list[str]:
    nums = [n for n in m.contexts if m.cell(FULL, n, ALL)]
    rows = []
    for policy in m.families:
        cells = [m.cell(policy, n, ALL) for n in nums]
        if policy != FULL and any(cells):
            again = max((c["recomputed"] for c in cells if c), default=0)
            rows.append((policy, f"{again:.0%}" if again else "", *map(_flips, cells)))
    return [
        "## Against full attention, question by question",
        "",
        *_prose(
            "All kinds together: points of exact match lost against full attention, with the 95 %",
            "interval, and",
            "the share of answers that stay what full attention says, right or wrong.",
        ),
        *_table(("policy", "read again", *map(str, nums)), rows, numbers=len(nums) + 1),
    ]


def _flips(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["same"] is None:
        return ""
    lost, low, high = (100 * cell[name] for name in ("lost", "lost_low", "lost_high"))
    return f"{lost:+.1f} [{low:+.1f}, {high:+.1f}], {cell['same']:.0%} same"


def _ranks(m: Measured) -> list[str]:
    found = {
        (r["policy"], r["documents"], r["rank"]): r for r in rows_of(m.data["ranks"]) if r["kind"] == ALL
    }
    nums = sorted({num for _, num, _ in found})
    rows = [
        (policy, str(num), *(_share(found.get((policy, num, rank))) for rank in RANKS))
        for policy in (FULL, TRUNCATED, PLAIN, CACHEFOCUS, FOCUSED, _REPAIRED)
        for num in nums
        if any((policy, num, rank) in found for rank in RANKS)
    ]
    return [
        "## Where the document with the answer stands",
        "",
        "Exact match in percent over all kinds, by the place of the question's first document.",
        "",
        *_table(("policy", "documents", *RANKS), rows, numbers=len(RANKS) + 1),
    ]


def _share(cell: dict[str, Any] | None) -> str:
    return f"{100 * share(cell):.1f}" if cell else ""


def _best_unit(m: Measured) -> list[str]:
    variants, layers = m.data["variants"], range(m.data["conditions"]["layers"])
    rows = [
        (str(r["documents"]), r["kind"], variants[r["variant"]], *(f"{x:.2f}" for x in r["by_layer"]))
        for r in rows_of(m.data["best_unit"])
        if r["documents"] > 1 and r["kind"] in ("one", "crossing", ALL)
    ]
    return [
        "## Precision@1 of attention, by layer",
        "",
        *_prose(
            "How often the part that a layer attends to most holds a fact of the answer, under plain",
            "re-positioning: by mean mass over heads and the question's rows, by its last row alone, and by",
            "squared masses.",
        ),
        *_table(("documents", "kind", "score", *(f"layer {i}" for i in layers)), rows, numbers=len(layers)),
    ]


def _risk(m: Measured) -> list[str]:
    rows = [
        (
            r["where"],
            r["what"],
            r["signal"],
            f"{r['bad']} of {r['asked']}",
            "" if r["auc"] is None else f"{r['auc']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
        )
        for r in rows_of(m.data["risk"])
    ]
    return [
        "## Risk signals",
        "",
        *_prose(
            "How well each signal of plain re-positioning tells answers that differ from those of full",
            "attention, or that are wrong, from the others: area under the curve, .5 is chance. Beyond the",
            "window full attention itself may fail, so there only the second says something.",
        ),
        *_table(("", "answer", "signal", "such answers", "AUC"), rows, numbers=2),
    ]


def _ttft(m: Measured) -> list[str]:
    nums = list(m.contexts)
    rows = []
    for policy in m.families:
        cells = [m.ttft.get((policy, n)) for n in nums]
        if any(cells):
            rows.append((policy, *(_times(c) for c in cells)))
    return [
        "## Time to first token",
        "",
        "![median time to first token by number of documents](img/quality-ttft.svg)",
        "",
        *_prose(
            "Medians in milliseconds with the documents' rows in memory; in brackets, as a share of full",
            "attention's. A model this small spends most of this time in calls, not in arithmetic: see",
            "[Measured](measured.md) for a larger one.",
        ),
        *_table(("policy", *map(str, nums)), rows, numbers=len(nums)),
        "Made by `python benchmarks/quality.py`, then `python benchmarks/report.py`.",
        "",
    ]


def _real(data: dict[str, Any]) -> list[str]:
    made, hits = data["conditions"], data["hit_rate"]
    agreement = [
        (r["policy"], r["data"], str(r["questions"]), f"{r['kl']:.4f}", f"{r['top1']:.1%}")
        for r in data["agreement"]
    ]
    over_time = [
        (
            f"{r['questions']:,}",
            f"{r['uses']:,}",
            f"{r['first_uses']:,}",
            f"{r['hit_rate']:.1%}",
            "" if r["after_first_use"] is None else f"{r['after_first_use']:.2%}",
        )
        for r in hits
    ]
    return [
        "## Real text",
        "",
        *_prose(
            f"`{made['model']}` ({made['says']}): KL divergence in nats and top-1 agreement with",
            "full attention",
            f"at {made['agreement_at']}; {made['documents']} documents of at most",
            f"{made['document_tokens']} tokens. {made['date']}, torch {made['torch']}, transformers",
            f"{made['transformers']}.",
        ),
        *_table(("policy", "data", "questions", "KL", "top-1"), agreement, numbers=3),
        *_prose(
            f"Hit rate over {made['hit_rate_questions']:,} Natural Questions in random order, each with its",
            "passage among others that were drawn anew; the store is closed and opened every",
            f"{made['store_opened_anew_every']} questions.",
        ),
        *_table(("questions", "uses", "first uses", "hits", "hits after first use"), over_time, numbers=5),
        "Made by `python benchmarks/real_text.py`.",
        "",
    ]


def _times(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    of_full = "" if cell["of_full"] is None else f" ({cell['of_full']:.0%})"
    return f"{cell['median_ms']:,.0f}{of_full}"


def _prose(*pieces: str) -> list[str]:
    """A paragraph, wrapped, and the empty line behind it."""
    return [*textwrap.wrap(" ".join(pieces), 112, break_long_words=False, break_on_hyphens=False), ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> list[str]:
    """A table whose last columns are numbers."""
    ruler = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(ruler)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]

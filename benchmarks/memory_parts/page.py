"""Writes docs/memory-measured.md from docs/data, for `benchmarks/report.py`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from memory_parts.claims import Cell, Measured, share, verdicts
from memory_parts.entries import FOUND, FULL, GIVEN, NOTHING

_WHY = """
Attention chooses better than chance, and yet it is a poor judge of what will be asked in a chat: a score is
earned before the question is there, so it says what the chat itself needed so far, and a fact that nobody
has mentioned again has earned nothing. And matches are fought token against token: of each pair of
neighbours one stays, so that what is left of a sentence is half of its words, in every head another half.
This reader, five layers deep, has little use for half a sentence, and a deeper sub-cache holds something of
everything and little that can be read; a ladder likewise. The models of the papers have 32 layers, and a
needle is kept in some of them.

Where the same documents are asked about again and again, as in the perplexity of documents below, earlier
questions earn the scores that later ones need, and there the cascade does what its paper says: the more
sub-caches, the closer to full attention.

Keeping whole messages and judging them by surprise (`salient`) does better in chats because both reasons
are gone: what cannot be made up again is known when it is read, and what stays is whole. How long it stays
is a choice: the shorter half-life suits chats in which everything told is news, the longer one a needle in
hay. It knows nothing of questions, and so where they repeat themselves a cascade of many sub-caches is
ahead.

What the archive misses at 100 budgets the search has mostly found, but not first, and the question looks
longer at a message that says the same of somebody else. Each alone picks another wrong one: of 896
questions asked to choose the rule (other chats than these), the search found the right message first in
69 %, attention in 95 %, their product in 97 %; answers were right in 91 to 92 % before and 96 to 97 %
after. In 2 % the search did not find it among 16, because the telling uses other words. With the right
message alone it answers: see the control.
"""


def lines(
    data: dict[str, Any], times: dict[str, Any] | None = None, soak: dict[str, Any] | None = None
) -> list[str]:
    """The page.

    Args:
        data: of docs/data/memory.json.
        times: of docs/data/memory-time.json; None: not measured.
        soak: of docs/data/soak.json; None: not measured.
    """
    m = Measured(data, times)
    return [
        "# Memory, measured",
        "",
        "<!-- written by benchmarks/report.py from docs/data/memory.json; do not edit -->",
        "",
        *_how(m),
        *_claims(m),
        *_facts(m),
        *_archive(m),
        *_passkeys(m),
        *_text(m),
        *(_time(times) if times else []),
        *(_soak(soak) if soak else []),
    ]


def _how(m: Measured) -> list[str]:
    made = m.data["conditions"]
    size = m.budget * made["bytes_per_token"] / 1024
    return [
        *_prose(
            f"`{made['model']}`, {made['parameters'] / 1e6:.1f}M parameters, {made['layers']} layers,",
            "trained on",
            f"{made['window']:,} positions; names held out of its training. Memories of {m.budget} tokens of",
            f"{made['bytes_per_token']:,} bytes ({size:,.0f} KiB), the system message among them;",
            "read in strides",
            "of a quarter of the budget, which stand beside it until they are inserted. Positions",
            "are ranks in",
            "the memory, so all of them lie within what the reader was trained on, however long the",
            "chat is; full",
            "attention runs out of them. An answer counts if it is right to the last token. Chats of exact",
            "lengths are read side by side by the package's own policies; intervals are 95 % (Wilson), as if",
            "questions about one chat were independent.",
        ),
        *_prose(
            f"CPU, {made['threads']} thread, {made['dtype']}, torch {made['torch']}, transformers",
            f"{made['transformers']}, Python {made['python']}, {made['date']}; weights {made['weights']};",
            f"{made['cpu_seconds']:,} processor seconds. Policies:",
            "`benchmarks/memory_parts/entries.py`. `ladder`",
            "A/B keeps A of B entries per sweep and layer; `combined` is a ladder over a cascade;",
            "`salient` keeps",
            "whole messages by surprise, with half-lives of 3 and (`slow`) 24 budgets.",
        ),
    ]


def _claims(m: Measured) -> list[str]:
    return [
        "## What holds on this model",
        "",
        "A claim holds or does not where its whole 95 % interval says so, and is not decided otherwise.",
        "",
        *_table(
            ("claim", "of", "", "figures"),
            [(v.claim, v.source, f"**{v.verdict}**", v.evidence) for v in verdicts(m)],
            numbers=0,
        ),
        *(line for part in _WHY.strip().split("\n\n") for line in (part, "")),
    ]


def _facts(m: Measured) -> list[str]:
    found = [
        "## Facts told long ago",
        "",
        "![exact match by tokens since the telling](img/memory-facts.svg)",
        "",
    ]
    for budget in sorted({key[1] for key in m.facts}):
        cells = {k: c for k, c in m.facts.items() if k[1] == budget and not k[2]}
        found += [
            *_prose(
                f"Budget {budget}: exact match in percent by tokens since the fact was told, other",
                "facts, talk",
                f"and questions in between (a turn takes about 21 tokens). {_widest(cells)} In brackets: the",
                "share of the telling message's entries, over layers and heads, that is still in memory.",
            ),
            *_grid(m, cells, budget, 0, NOTHING, with_kept=True),
        ]
    return found


def _archive(m: Measured) -> list[str]:
    room = m.budget // 4
    cells = {k: c for k, c in m.facts.items() if k[1] == m.budget and k[2]}
    if not cells:
        return []
    found = [
        "## With an archive",
        "",
        *_prose(
            f"The same bytes, divided: a memory of {m.budget - room} tokens and room for {room}",
            "tokens that come",
            "back. Every message was archived as it was read. The question's words find 16 messages",
            "(an embedding",
            "of hashed words); the question looks at them, and what its last row pays each, over all",
            "layers, times the",
            "similarity as a share of the greatest one's to the power of 4, decides: four at most come",
            "back, none below",
            "half of the best, as many as fit, re-positioned behind the system message. For that look the",
            "16 messages' rows are there beside the memory.",
        ),
    ]
    for back, title in (
        (NOTHING, "Nothing comes back:"),
        (FOUND, "What was found comes back:"),
        (GIVEN, "Control: the message that tells it comes back:"),
    ):
        found += [title, "", *_grid(m, cells, m.budget, room, back)]
    return found


def _passkeys(m: Measured) -> list[str]:
    found = [
        "## Passkeys",
        "",
        "![exact match by length](img/memory-passkeys.svg)",
        "",
        *_prose(
            "Four to six digits in hay, the length in budgets; 13 depths, evenly spread over the length,",
            "16 passkeys at each, as far as all policies have been asked. What stands before the passkey",
            "is cut to one budget of hay. Exact match in percent, in brackets the share of right digits",
            "(given the digits before).",
        ),
    ]
    for room in sorted({key[2] for key in m.passkeys}):
        cells = {k: c for k, c in m.passkeys.items() if k[2] == room}
        found += [f"{_widest(cells)}", ""] if not room else [f"With the archive ({room} tokens of it):", ""]
        found += _grid(m, cells, m.budget, room, FOUND if room else NOTHING, with_digits=True)
    return found


def _widest(cells: dict[tuple[Any, ...], Cell]) -> str:
    asked = [c["asked"] for c in cells.values()]
    widest = max(c["high"] - c["low"] for c in cells.values())
    counts = " to ".join(dict.fromkeys(map(str, (min(asked), max(asked)))))
    return f"{counts} questions a cell; intervals reach at most {50 * widest:.1f} points to either side."


def _grid(
    m: Measured,
    cells: dict[tuple[Any, ...], Cell],
    budget: int,
    room: int,
    back: str,
    *,
    with_kept: bool = False,
    with_digits: bool = False,
) -> list[str]:
    columns = sorted({key[4] for key in cells})
    rows = []
    for policy, family in m.families.items():
        here = [cells.get((policy, budget, room, back, column)) for column in columns]
        if not any(here):
            continue
        shown = []
        for cell in here:
            text = "" if cell is None else f"{100 * share(cell):.1f}"
            if cell and with_kept:
                text += f" ({100 * cell['kept']:.0f})"
            if cell and with_digits and cell["digits"]:
                text += f" ({100 * cell['digits_right'] / cell['digits']:.0f})"
            shown.append(text)
        rows.append((policy, family, *shown))
    return _table(("policy", "of", *(f"{c:,}" for c in columns)), rows, numbers=len(columns))


def _text(m: Measured) -> list[str]:
    keys = sorted({(budget, text) for _, budget, text, _ in m.texts})
    if not keys:
        return []
    found = [
        "## Streaming perplexity",
        "",
        *_prose(
            "Generated chats, and generated documents with questions about them: of all tokens, and",
            "of the values",
            "in answers, behind the first budget; given in brackets, the change against full",
            "attention with its",
            "95 % interval, text by text. The reader was trained on answers most of all, so what it makes of",
            "other tokens says little; values are what has to be remembered.",
        ),
    ]
    for budget, text in keys:
        rows = []
        for policy, family in m.families.items():
            parts = [
                t for k, t in m.texts.items() if k[:3] == (policy, budget, text) and t["first"] >= budget
            ]
            if not parts:
                continue
            rows.append(
                (
                    policy,
                    family,
                    f"{math.exp(_mean(parts, 'loss', 'tokens')):.2f}",
                    _change(m, policy, budget, text),
                    f"{math.exp(_mean(parts, 'value_loss', 'values')):.2f}",
                )
            )
        found += [
            f"Budget {budget}, {text}, tokens {budget:,} to 2,048:",
            "",
            *_table(("policy", "of", "all tokens", "against full", "values"), rows, numbers=3),
        ]
    return found


def _mean(parts: Sequence[dict[str, Any]], loss: str, count: str) -> float:
    return sum(p[loss] * p[count] for p in parts) / max(1, sum(p[count] for p in parts))


def _change(m: Measured, policy: str, budget: int, text: str) -> str:
    gap = m.gaps.get((policy, budget, text, FULL))
    if not gap:
        return ""
    middle, low, high = (100 * math.expm1(gap[name]) for name in ("gap", "low", "high"))
    return f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _time(times: dict[str, Any]) -> list[str]:
    made, reading = times["conditions"], times["reading"]
    rows = [
        (
            name,
            *(f"{1e3 * s:,.0f}" for s in seconds),
            f"{times['exponents'][name]:.2f}" if times["exponents"][name] else "",
        )
        for name, seconds in reading["seconds"].items()
    ]
    rates = times["decoding"]
    names = list(rates[0]["tokens_per_second"])
    return [
        "## Time",
        "",
        *_prose(
            f"The reader's shape with random weights and more positions; {made['threads']} thread, processor",
            f"time, medians of {made['repeat']}, torch {made['torch']}, {made['date']}, load",
            f"{made['load']} (other",
            "work ran on the machine). Milliseconds to read a text of so many tokens,",
            f"in strides of {made['stride']} over a memory of {made['budget']}, and at once by full",
            "attention; the",
            "last column is the exponent of the growth over the longer half.",
        ),
        *_table(("", *(f"{n:,}" for n in reading["lengths"]), "exponent"), rows, numbers=len(rows[0]) - 1),
        *_prose(
            "Tokens per second of decoding, one conversation, by what is in memory, the insertion of",
            "each stride",
            "included:",
        ),
        *_table(
            ("memory", *names),
            [(f"{r['budget']:,}", *(f"{r['tokens_per_second'][n]:,.0f}" for n in names)) for r in rates],
            numbers=len(names),
        ),
    ]


def _soak(soak: dict[str, Any]) -> list[str]:
    made, points = soak["conditions"], soak["points"]
    picked = points[9::10]
    return [
        "## A long chat",
        "",
        *_prose(
            f"{soak['tokens']:,} tokens in {soak['turns']:,} turns through one session of `{made['model']}`",
            f"({made['memory']}, budget {made['budget']}, strides of {made['stride']}, answers of at most",
            f"{made['answer']} tokens), {soak['minutes']:.1f} minutes on a busy machine. Resident",
            "memory of the",
            f"last tenth against the second one: {soak['memory_growth']:+.2%}; processor time per token:",
            f"{soak['cpu_growth']:+.1%}. The session itself holds {made['bytes'] / 1e6:.1f} MB.",
        ),
        *_table(
            ("tokens", *(f"{p['tokens']:,}" for p in picked)),
            [
                ("resident, MB", *(f"{p['resident'] / 1e6:.1f}" for p in picked)),
                ("processor, µs per token", *(f"{p['cpu_us_per_token']:.0f}" for p in picked)),
            ],
            numbers=len(picked),
        ),
    ]


def _prose(*parts: str) -> list[str]:
    text = " ".join(parts)
    return [*textwrap.wrap(text, 112, break_long_words=False, break_on_hyphens=False), ""]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> list[str]:
    rule = "|" + "---|" * (len(header) - numbers) + "---:|" * numbers
    return [
        *(f"| {' | '.join(row)} |" for row in (header,)),
        rule,
        *(f"| {' | '.join(r)} |" for r in rows),
        "",
    ]

"""The figures beside those of others as a section of a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

Data = dict[str, Any]

_STORED = ("TurboRAG's way", "kvrag int8", "kvrag")
_TITLES = {
    "transformers": "transformers, `generate`",
    "TurboRAG's way": "TurboRAG's way, `torch.load`",
    "kvrag": "**kvrag**, float32 rows",
    "kvrag int8": "**kvrag**, int8 rows",
}
_CLOCKED = ("first", "each", "median", "total")
_ANSWERS = (1, 32, 128, 512)


def lines(found: Data) -> list[str]:
    """Tables of everything that was measured, and their conditions.

    Of a machine that was busy with other work, seconds of the processor are shown, not those on the wall.
    """
    if is_busy(found):
        found = json.loads(json.dumps(found))
        taken = [
            case for sides in found["cases"].values() for cases in sides.values() for case in cases.values()
        ]
        for one in (*taken, *found["turn"]["sides"].values()):
            one |= {name: one[f"{name}_busy"] for name in _CLOCKED if name in one}
    return [
        *_conditions(found),
        "",
        *_first(found),
        "",
        *_answers(found),
        "",
        *_losses(found),
        "",
        *_turn(found),
        "",
        *_shares(found),
        "",
        *_agreement(found),
    ]


def is_busy(found: Data) -> bool:
    """Whether others had so much to do that seconds on the wall say little."""
    made = found["conditions"]
    return bool(made["load"] > made["cores"] + 0.5)


def _title(side: str) -> str:
    return _TITLES.get(side, side.replace("llama.cpp ", "llama.cpp, "))


def _conditions(found: Data) -> list[str]:
    made = found["conditions"]
    llama = found.get("llama")
    versions = f", llama-cpp-python {llama['versions']['llama-cpp-python']}" if llama else ""
    return [
        f"{made['parameters'] / 1e6:.0f}M parameters with random weights ({made['shape']['layers']} layers, "
        f"{made['shape']['hidden']} wide, {made['shape']['kv_heads']} key heads of "
        f"{made['shape']['head_dim']}), the same on every side, float32 where nothing else is said. "
        f"Documents of {made['document_tokens']} tokens out of a pool of {made['pool']}, questions of "
        f"{made['question_tokens']}. {made['device']}, {made['cores']} cores, {made['threads']} threads "
        f"({made['cpu_capability']}); load average {made['load']} before, {made['load_after']} after. "
        f"torch {made['torch']}, transformers {made['transformers']}{versions}, "
        f"Python {made['python']}, {made['date']}. Sides take turns in one run of "
        f"{made['seconds'] / 60:.0f} minutes; medians of {made['rounds']} runs of whole prompts, "
        f"{made['rounds'] * made['quick']} of what reads only the question.",
        *(["", _BUSY] if is_busy(found) else []),
    ]


def _cell(found: Data, count: str, side: str, case: str) -> str:
    return f"{found['cases'][count][side][case]['first'] * 1e3:,.0f}"


def _first(found: Data) -> list[str]:
    counts = list(found["cases"])
    most = counts[-1]
    ours = found["cases"][most]["kvrag"]["warm"]["first"]
    made = [
        "| first token, ms | "
        + " | ".join(f"{count} documents" for count in counts)
        + f" | of kvrag's at {most} |",
        "|---|" + "---:|" * (len(counts) + 1),
    ]
    for heading, rows in _groups(found):
        made.append(f"| *{heading}* |" + " |" * (len(counts) + 1))
        for title, side, case in rows:
            times = [_cell(found, count, side, case) for count in counts]
            ratio = found["cases"][most][side][case]["first"] / ours
            made.append(f"| {title} | " + " | ".join(times) + f" | {ratio:.3g}x |")
    return made


def _groups(found: Data) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Headings, and below each the rows: title, side, case."""
    kinds = [side for side in next(iter(found["cases"].values())) if side.startswith("llama.cpp")]
    prefix = ["transformers", *kinds]
    yield "nothing known, or another first document", [(_title(s), s, "full") for s in prefix]
    yield (
        "the same documents in the same order, kept in memory",
        [(_title(side), side, "same") for side in prefix],
    )
    if kinds:
        yield (
            "the same from a file of the saved state, in the page cache / dropped from it",
            [
                (f"{_title(side)}{said}", side, case)
                for side in kinds
                for said, case in (("", "file"), (", dropped", "file, cold"))
            ],
        )
    yield "the first half the same, other documents behind", [(_title(s), s, "half") for s in prefix]
    if kinds:
        yield (
            "the first document left out, another one at the end, `--cache-reuse`",
            [(_title(side), side, "moved") for side in kinds],
        )
    yield (
        "any documents in any order, from files in the page cache / dropped from it",
        [
            (f"{_title(side)}{said}", side, case)
            for side in _STORED
            for said, case in (("", "warm"), (", dropped", "cold"))
        ],
    )


def answer_seconds(case: Data, each: float, tokens: int) -> float:
    """A whole answer."""
    return float(case["first"] + (tokens - 1) * each)


def _answers(found: Data) -> list[str]:
    most = list(found["cases"])[-1]
    weights = found.get("llama", {}).get("weights", {})
    plain = 4 * found["conditions"]["parameters"]
    made = [
        f"| {most} documents that nobody asked about together before | "
        + " | ".join(f"{n} token{'s' if n > 1 else ''}, s" for n in _ANSWERS)
        + " | each further, ms | cached token, bytes | weights, MB |",
        "|---|" + "---:|" * (len(_ANSWERS) + 3),
    ]
    for side, cases in found["cases"][most].items():
        case = cases["warm" if side in _STORED else "full"]
        each = cases["warm" if side in _STORED else "full"]["each"]
        whole = [f"{answer_seconds(case, each, n):,.1f}" for n in _ANSWERS]
        size = weights.get(side.removeprefix("llama.cpp "), plain)
        made.append(
            f"| {_title(side)} | " + " | ".join(whole) + f" | {each * 1e3:,.0f} "
            f"| {found['bytes_per_token'][side]:,.0f} | {size / 1e6:,.0f} |"
        )
    return made


_BUSY = (
    "**The machine was busy with other work: all times are seconds of the processor, all threads together, "
    "without waiting for disks. Read the ratios.**"
)
_CLEARLY = 0.95
_CASES = {
    "same": "with the same documents again, kept in memory",
    "file": "with the same documents again, from a saved state",
    "half": "with the first half the same",
    "moved": "with the first document left out, `--cache-reuse`",
    "full": "from nothing",
    "warm": "from files in the page cache",
}


def _losses(found: Data) -> list[str]:
    """Who is faster than kvrag, by a twentieth or more; from the figures, so that nothing is left out."""
    count = list(found["cases"])[-1]
    cases = found["cases"][count]
    ours = cases["kvrag"]["warm"]
    made = [f"Faster than kvrag's float32 rows in the page cache ({count} documents):", ""]
    for side, taken in cases.items():
        if side == "kvrag":
            continue
        for case, said in _CASES.items():
            if case in taken and taken[case]["first"] < _CLEARLY * ours["first"]:
                times = ours["first"] / taken[case]["first"]
                made.append(f"- {_title(side)}: the first token {said}, {times:.2g} times as fast.")
        new = taken["warm" if side in _STORED else "full"]
        if new["each"] < _CLEARLY * ours["each"]:
            ahead = new["first"] - ours["first"]
            until = 1 + ahead / (ours["each"] - new["each"])
            length = f"from {math.ceil(until):,} tokens on" if ahead > 0 else "at any length"
            times, how = ours["each"] / new["each"], _CASES["warm" if side in _STORED else "full"]
            made.append(
                f"- {_title(side)}: each further token, {times:.2g} times as fast; its whole answer {how} "
                f"is there first {length}."
            )
    return made if len(made) > 2 else ["Nothing was faster than kvrag's float32 rows in the page cache."]


def _turn(found: Data) -> list[str]:
    turn = found["turn"]
    ours = turn["sides"]["kvrag"]["total"]
    made = [
        f"| {turn['requests']} requests of {turn['documents']} documents at random | first token, median, ms "
        "| all first tokens, s | of kvrag's | documents' tokens not read again |",
        "|---|---:|---:|---:|---:|",
    ]
    made += [
        f"| {_title(side)} | {took['median'] * 1e3:,.0f} | {took['total']:,.1f} "
        f"| {took['total'] / ours:.3g}x | {took['reused']:.0%} |"
        for side, took in turn["sides"].items()
    ]
    return made


def _shares(found: Data) -> list[str]:
    names = {"0": "all documents alike", "1": "popular ones more often (Zipf, 1)"}
    ways = list(next(iter(found["shares"].values())))
    made = [
        "| documents' tokens not read again, 1,000 requests, by what is kept | " + " | ".join(ways) + " |",
        "|---|" + "---:|" * len(ways),
    ]
    made += [
        f"| {names[skew]} | " + " | ".join(f"{shares[way]:.0%}" for way in ways) + " |"
        for skew, shares in found["shares"].items()
    ]
    return made


def _agreement(found: Data) -> list[str]:
    apart = found["agreement"]
    said = [
        f"TurboRAG's way and kvrag are {apart[_STORED[0]]:.0e} apart (documents do not see each other)",
    ]
    kinds = [
        f"{side.removeprefix('llama.cpp ')} {d:.0e}" for side, d in apart.items() if side.startswith("llama")
    ]
    if kinds:
        said.append(f"llama.cpp and transformers {', '.join(kinds)}")
    return [
        "Checked before anything was timed: the largest difference of the next token's logits, in standard "
        f"deviations of the logits. {'; '.join(said)}."
    ]

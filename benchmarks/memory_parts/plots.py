"""Plots of `benchmarks/memory.py`: facts by distance, passkeys by length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory_parts.entries import FOUND, FULL, NOTHING, SALIENT, SLOW, WINDOW
from memory_parts.summary import rows_of

SHOWN = (
    (FULL, "black", "-"),
    (WINDOW, "tab:blue", "-"),
    ("cascade 2", "tab:green", "--"),
    ("cascade 4", "tab:green", "-"),
    ("cascade 8", "tab:green", ":"),
    ("ladder 1/2", "tab:orange", "-"),
    ("combined 4, bonus 1", "tab:brown", "-"),
    (SALIENT, "tab:red", "-"),
    (SLOW, "tab:red", "--"),
)
Line = tuple[str, str, str, list[dict[str, Any]]]


def plot(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write memory-facts.svg and memory-passkeys.svg; nothing where matplotlib is missing."""
    try:
        import matplotlib  # noqa: PLC0415 - an extra; a run that lasted hours is not to fail for it
    except ImportError:
        print("matplotlib is missing: no plots; pip install matplotlib, then run with --report")
        return []
    matplotlib.use("svg")
    # Letters stay letters, and the same figures give the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kvrag", "font.size": 8}
    folder.mkdir(parents=True, exist_ok=True)
    budget = data["conditions"]["budget"]
    facts = [c for c in rows_of(data["facts"]) if c["budget"] == budget]
    passkeys = [c for c in rows_of(data["passkeys"]) if c["budget"] == budget and not c["room"]]
    lines = _lines([c for c in facts if not c["room"]], "distance")
    for policy, colour in ((WINDOW, "tab:blue"), (SALIENT, "tab:red")):
        back = [c for c in facts if c["policy"] == policy and c["back"] == FOUND]
        lines.append((f"{policy} and archive", colour, "-.", sorted(back, key=lambda c: c["distance"])))
    return [
        _figure(folder / "memory-facts.svg", lines, "distance", "tokens since the fact was told", budget),
        _figure(folder / "memory-passkeys.svg", _lines(passkeys, "times"), "times", "length in budgets", 1),
    ]


def _lines(cells: Sequence[dict[str, Any]], column: str) -> list[Line]:
    return [
        (name, colour, style, sorted((c for c in cells if c["policy"] == name), key=lambda c: c[column]))
        for name, colour, style in SHOWN
    ]


def _figure(file: Path, lines: Sequence[Line], column: str, label: str, budget: int) -> Path:
    from matplotlib import pyplot  # noqa: PLC0415 - see above

    figure, axes = pyplot.subplots(figsize=(5.8, 3.2), layout="constrained")
    ticks: set[float] = set()
    for name, colour, style, found in lines:
        cells = [c for c in found if c["back"] in (NOTHING, FOUND)]
        if not cells:
            continue
        x = [c[column] for c in cells]
        ticks.update(x)
        axes.plot(
            x,
            [c["right"] / c["asked"] for c in cells],
            style,
            color=colour,
            marker=".",
            linewidth=1,
            label=name,
        )
        lows, highs = [c["low"] for c in cells], [c["high"] for c in cells]
        axes.fill_between(x, lows, highs, color=colour, alpha=0.1, linewidth=0)
    axes.axvline(budget, color="grey", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{t:g}" for t in sorted(ticks)])
    axes.tick_params(axis="x", labelrotation=45)
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("exact match")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file

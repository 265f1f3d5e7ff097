"""Plots of `benchmarks/quality.py`: exact match, and time to first token, against the number of documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quality_parts.claims import LEAST
from quality_parts.contexts import KINDS
from quality_parts.policies import FULL, NEAR, PLAIN, TRUNCATED
from quality_parts.summary import rows_of

# One line for each family; more would not be readable.
SHOWN = (
    (FULL, "black", "-"),
    (TRUNCATED, "black", ":"),
    ("naive", "tab:brown", "--"),
    ("PCW", "tab:pink", "--"),
    ("APE .9/.9", "tab:red", "--"),
    (PLAIN, "tab:blue", "-"),
    ("keep .5, sort", "tab:green", "-"),
    ("keep 2, best layer", "tab:green", "--"),
    ("keep 2, best layer, heats", "tab:olive", "--"),
    (NEAR, "tab:gray", "-"),
    ("second look, keep 2, squared", "tab:olive", "-"),
    ("EPIC 16", "tab:purple", "--"),
    ("query-driven .15, best layers", "tab:orange", "-"),
    ("encoded behind parts before", "tab:cyan", "-"),
)


def plot(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write quality-KIND.svg for every kind, and quality-ttft.svg; nothing where matplotlib is missing."""
    try:
        import matplotlib  # noqa: PLC0415 - an extra; a run that lasted hours is not to fail for it
    except ImportError:
        print("matplotlib is missing: no plots; pip install matplotlib, then run with --report")
        return []
    matplotlib.use("svg")
    # Letters stay letters, and the same figures give the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kvrag", "font.size": 8}
    folder.mkdir(parents=True, exist_ok=True)
    cells = [c for c in rows_of(data["cells"]) if c["asked"] >= LEAST]
    made = [
        _figure(
            folder / f"quality-{kind}.svg",
            [c for c in cells if c["kind"] == kind],
            "exact match",
            lambda c: (c["right"] / c["asked"], c["low"], c["high"]),
        )
        for kind in KINDS
        if any(c["kind"] == kind for c in cells)
    ]
    made.append(
        _figure(
            folder / "quality-ttft.svg",
            rows_of(data["ttft"]),
            "median ms to first token",
            lambda c: (c["median_ms"], None, None),
            log=True,
        )
    )
    return made


def _figure(
    file: Path,
    rows: Sequence[dict[str, Any]],
    title: str,
    value: Callable[[dict[str, Any]], tuple[float, float | None, float | None]],
    *,
    log: bool = False,
) -> Path:
    from matplotlib import pyplot  # noqa: PLC0415 - see above

    figure, axes = pyplot.subplots(figsize=(5.6, 3.2), layout="constrained")
    for policy, colour, line in SHOWN:
        here = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["documents"])
        if not here:
            continue
        numbers = [r["documents"] for r in here]
        values, lows, highs = zip(*map(value, here), strict=True)
        axes.plot(numbers, values, line, color=colour, marker=".", linewidth=1, label=policy)
        if lows[0] is not None:
            axes.fill_between(numbers, lows, highs, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(ticks := sorted({r["documents"] for r in rows}), [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("documents")
    axes.set_ylabel(title)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file

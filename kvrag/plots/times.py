"""Time to the first token against the number of documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING

from kvrag.answer import Answer
from kvrag.errors import InputError
from kvrag.plots.drawing import PALETTE, axes_or_new, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvrag.rag import Reply

_MARKERS = "osD^v"


def ttft(
    runs: Mapping[str, Iterable[Answer | Reply | tuple[int, float]]],
    *,
    log: bool = False,
    axes: Axes | None = None,
) -> Axes:
    """Time to the first token against the number of documents: a dot for each run, a line through medians.

    Args:
        runs: by name, answers; or pairs of the number of documents and seconds, for what was measured
            elsewhere (`kvrag.baseline.ordinary_answer(...).first_token`).
        log: a logarithmic scale of times.
        axes: where to draw; None: a figure of its own.

    Raises:
        InputError: there are no runs, or one is neither an answer nor such a pair.
        MissingExtra: matplotlib is not installed.
    """
    measured = {name: [_point(run) for run in some] for name, some in runs.items()}
    if not any(measured.values()):
        raise InputError("there are no runs to draw; give answers, or pairs of documents and seconds")
    axes = axes_or_new(axes, 6.4, 3.6)
    for number, (name, points) in enumerate(measured.items()):
        color, marker = PALETTE[number % len(PALETTE)], _MARKERS[number % len(_MARKERS)]
        by_number: dict[int, list[float]] = {}
        for count, seconds in points:
            by_number.setdefault(count, []).append(1e3 * seconds)
        counts = sorted(by_number)
        axes.plot(counts, [median(by_number[n]) for n in counts], marker=marker, color=color, label=name)
        axes.plot(*zip(*((n, 1e3 * s) for n, s in points), strict=True), ".", color=color, alpha=0.4)
    axes.set_xlabel("documents in the prompt")
    axes.set_ylabel("time to first token (ms)")
    axes.locator_params(axis="x", integer=True)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    bare(axes)
    return axes


def _point(run: Answer | Reply | tuple[int, float]) -> tuple[int, float]:
    """Number of documents, and seconds."""
    found = run if isinstance(run, Answer) else getattr(run, "answer", None)
    if isinstance(found, Answer):
        return len(found.documents), found.timing.first_token
    try:
        count, seconds = run  # type: ignore[misc]
        return int(count), float(seconds)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a {type(run).__name__} is no run; expected a finished answer, or a pair of the number of "
            "documents and seconds"
        ) from error

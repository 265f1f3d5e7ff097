"""The segment table: where documents lie in the store, and where they appear in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from kvrag.answer import Answer
from kvrag.citations import Seen
from kvrag.errors import InputError
from kvrag.plots.drawing import BLUE, GREEN, GREY, VERMILION, axes_or_new, bare, finished, labels, name_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvrag.rag import Reply

_HEIGHT = 0.5


class Stay(NamedTuple):
    """Neighbouring layers that read a document at one place.

    Attributes:
        first: layer.
        last: layer.
        start: position of the document's first row.
    """

    first: int
    last: int
    start: int


def segments(
    found: Answer | Reply, *, names: Mapping[str, str] | None = None, axes: Axes | None = None
) -> Axes:
    """The segment table behind an answer: where each document's rows lie, and where they appear.

    The outlined bar is the document as it lies in the store, read on its own at positions from 0 on. The
    filled one is the same rows where the question sees them: nothing is copied, the query is turned by the
    difference. Where a policy moves documents while the question is read, there is a bar for each run of
    layers, the first at the top; the layers stand beside them.

    Args:
        found: a finished answer or reply.
        names: what documents are called, by key; None: their source or their first words.
        axes: where to draw; None: a figure of its own.

    Raises:
        InputError: the answer is not finished, or rests on no documents.
        MissingExtra: matplotlib is not installed.
    """
    inner = finished(found)
    called = labels(found, names)
    axes = axes_or_new(axes, 8.0, 1.5 + 0.45 * len(called))
    prefix = len(inner.plan.prefix.tokens) if inner.plan.prefix else 0
    for row, use in enumerate(inner.documents):
        lasting = stays(inner, row)
        color = BLUE if use.is_read else GREY
        if lasting:
            axes.barh(row, use.num_tokens, 0.8 * _HEIGHT, color="none", edgecolor=color, linewidth=0.8)
        for place, stay in enumerate(lasting):
            height = _HEIGHT / len(lasting)
            at = row - _HEIGHT / 2 + (place + 0.5) * height
            axes.barh(at, use.num_tokens, 0.9 * height, left=stay.start, color=color)
        axes.annotate(
            _layers(lasting, inner),
            (max([use.num_tokens, *(stay.start + use.num_tokens for stay in lasting)]), row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize="x-small",
        )
    _surroundings(axes, inner, prefix, len(called))
    return _finish(axes, called)


def stays(found: Answer, document: int) -> list[Stay]:
    """The places at which layers read a document, in order of the layers.

    Raises:
        InputError: the answer was made without them.
    """
    if not found.layers:
        raise InputError("the answer does not say what its layers read; answer the question again")
    seen = [(number, layer[document]) for number, layer in enumerate(found.layers)]
    read: list[tuple[int, Seen]] = [(number, one) for number, one in seen if one is not None]
    runs = (list(run) for _, run in groupby(read, key=lambda pair: pair[1].start))
    return [Stay(run[0][0], run[-1][0], run[0][1].start) for run in runs]


def _layers(lasting: Sequence[Stay], found: Answer) -> str:
    """Which layers read it, where that is not all of them at one place."""
    if not lasting:
        return "lost its heat"
    if len(lasting) == 1 and lasting[0].last == len(found.layers) - 1:
        return ""
    spans = [str(s.first) if s.first == s.last else f"{s.first} to {s.last}" for s in lasting]
    only = "" if lasting[-1].last == len(found.layers) - 1 else " only"
    return f"layer{'s' if len(spans) > 1 or 'to' in spans[0] else ''} {', '.join(spans)}{only}"


def _surroundings(axes: Axes, found: Answer, prefix: int, num_rows: int) -> None:
    """What is not a document: prefix and question, through all rows."""
    num_question = len(found.plan.spans[-1].tokens)
    if prefix:
        axes.axvspan(0, prefix, color=GREEN, alpha=0.35, linewidth=0, label="prefix, cached")
    axes.axvspan(
        found.question_at,
        found.question_at + num_question,
        color=VERMILION,
        alpha=0.5,
        linewidth=0,
        label="question, read now",
    )
    # Drawn where nobody sees them, for the legend alone.
    axes.barh(num_rows + 9, 0, color="none", edgecolor=GREY, label="where it lies in the store")
    axes.barh(num_rows + 9, 0, color=BLUE, label="where it appears")
    if not all(use.is_read for use in found.documents):
        axes.barh(num_rows + 9, 0, color=GREY, label="dropped")


def _finish(axes: Axes, called: list[str]) -> Axes:
    name_rows(axes, called)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("position (tokens)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize="small")
    bare(axes)
    return axes

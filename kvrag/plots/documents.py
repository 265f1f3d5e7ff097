"""Where an answer came from: the share of the attention that each document got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvrag.answer import DocumentUse
from kvrag.plots.drawing import BLUE, GREY, VERMILION, axes_or_new, bare, finished, labels, name_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvrag.answer import Answer
    from kvrag.rag import Reply

_WORDS = 60


def answer(
    found: Answer | Reply, *, names: Mapping[str, str] | None = None, axes: Axes | None = None
) -> Axes:
    """Where an answer came from: each document's share of the attention, and what became of it.

    The wide bar is `DocumentUse.focus`, the share among the documents of squared attention: the better
    witness. The thin one is `mass`, the share of all attention, the question's and the prefix's included.
    Beside them stands whether the document came from the store, which layer dropped it, and, for a policy
    with `spans`, the place in it that was looked at most.

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
    axes = axes_or_new(axes, 8.0, 1.2 + 0.5 * len(called))
    rows = range(len(called))
    axes.barh(rows, [100 * use.focus for use in inner.documents], 0.5, color=BLUE, label="focus")
    below = [row + 0.35 for row in rows]
    axes.barh(below, [100 * use.mass for use in inner.documents], 0.18, color=VERMILION, label="mass")
    for row, use in zip(rows, inner.documents, strict=True):
        end = 100 * max(use.focus, use.mass)
        axes.annotate(
            _became(use), (end, row), (4, 0), textcoords="offset points", va="center", fontsize="small"
        )
        if use.span is not None and use.span.text:
            axes.annotate(
                _quoted(use.span.text),
                (100 * use.mass, row + 0.35),
                (4, -1),
                textcoords="offset points",
                va="center",
                fontsize="x-small",
                fontstyle="italic",
                color=GREY,
            )
    name_rows(axes, called)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the attention while the answer was written (%)")
    axes.legend(loc="lower right", frameon=False)
    bare(axes)
    return axes


def _became(use: DocumentUse) -> str:
    """In words, what was done with a document."""
    parts = [f"{use.num_tokens} tokens", "cached" if use.is_hit else "read now"]
    if use.dropped_at is not None:
        parts.append(f"dropped at layer {use.dropped_at}")
        parts += ["taken back"] if use.is_read else []
    elif not use.is_read:
        parts.append("left out")
    return ", ".join(parts)


def _quoted(text: str) -> str:
    words = " ".join(text.split()).replace("$", r"\$")
    return f"“{words if len(words) <= _WORDS else words[: _WORDS - 1] + '…'}”"

"""What each layer looked at while a question was read, and who was dropped where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from kvrag.errors import InputError
from kvrag.plots.drawing import GREY, axes_or_new, finished, labels, name_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvrag.answer import Answer
    from kvrag.rag import Reply

_CELLS = 200  # with more of them, numbers could not be read
_LIGHT = 0.55  # of the largest share: cells above are light


def masses(
    found: Answer | Reply,
    *,
    measure: Literal["mass", "focus"] = "mass",
    names: Mapping[str, str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Each document's share of the attention in each layer, while the question was read.

    Hatched cells are layers that did not read the document: it was dropped before, and none of its rows of
    these layers were loaded.

    Args:
        found: a finished answer or reply.
        measure: "mass", the share of attention that pruning goes by; or "focus", of squared attention.
        names: what documents are called, by key; None: their source or their first words.
        axes: where to draw; None: a figure of its own.

    Raises:
        InputError: the answer is not finished, rests on no documents, or there is no such measure.
        MissingExtra: matplotlib is not installed.
    """
    inner = finished(found)
    if measure not in ("mass", "focus"):
        raise InputError(f"measure is {measure!r}; expected 'mass' or 'focus'")
    if not inner.layers:
        raise InputError("the answer does not say what its layers read; answer the question again")
    shares = _shares(inner, measure)
    called = labels(found, names)
    axes = axes_or_new(axes, 2.6 + 0.5 * min(24, shares.shape[1]), 1.3 + 0.34 * len(called))
    axes.patch.set(hatch="///", edgecolor=GREY, linewidth=0)
    image = axes.imshow(shares, cmap="cividis", aspect="auto", vmin=0, interpolation="nearest")
    if shares.size <= _CELLS:
        _write(axes, shares)
    name_rows(axes, called)
    axes.set_xlabel("layer (hatched: not read any more)")
    axes.locator_params(axis="x", integer=True)
    what = "attention" if measure == "mass" else "squared attention"
    axes.figure.colorbar(image, ax=axes, label=f"{what} (%)")
    return axes


def _shares(found: Answer, measure: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[N, L], in percent; NaN where a layer did not read a document."""
    columns = [[np.nan if s is None else 100 * getattr(s, measure) for s in layer] for layer in found.layers]
    return np.array(columns).T


def _write(axes: Axes, shares: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
    """The numbers, dark on light cells and light on dark ones."""
    for (row, layer), share in np.ndenumerate(shares):
        if np.isnan(share):
            continue
        color = "black" if share > _LIGHT * np.nanmax(shares) else "white"
        axes.text(layer, row, f"{share:.0f}", ha="center", va="center", fontsize="x-small", color=color)

"""What all pictures share: axes, colours, and names for documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvrag.answer import Answer
from kvrag.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvrag.rag import Reply

# Colours for people who confuse red and green, by Okabe and Ito (2008) and, the purple, by Tol; of these, and
# a grey, those with a contrast of 3 to 1 against white and against black.
BLUE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#009E73", "#D55E00", "#AA4499", "#767676"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, GREY)

_LABEL = 26


def axes_or_new(axes: Axes | None, width: float, height: float) -> Axes:
    """The axes that were given, or those of a new figure of this size in inches.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if axes is not None:
        return axes
    return pyplot().subplots(figsize=(width, height), layout="constrained")[1]  # type: ignore[no-any-return]


def pyplot() -> Any:
    """The part of matplotlib that makes figures.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as module  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra("matplotlib", "plots") from error
    return module


def finished(found: Answer | Reply) -> Answer:
    """The answer itself.

    Raises:
        InputError: it is something else, or rests on no documents.
    """
    inner = found if isinstance(found, Answer) else getattr(found, "answer", None)
    if not isinstance(inner, Answer):
        raise InputError(
            f"a {type(found).__name__} cannot be drawn; give a finished answer: what Engine.answer returns, "
            "stream.answer after the last piece, or ask(...).reply()"
        )
    if not inner.documents:
        raise InputError("the answer rests on no documents, so there is nothing to draw")
    return inner


def labels(found: Answer | Reply, names: Mapping[str, str] | None) -> list[str]:
    """What each document is called: as `names` says, by its source, or by its first words."""
    inner = finished(found)
    called = {source.id: source.name for source in getattr(found, "sources", ())} | dict(names or {})
    texts = [" ".join(span.text.split()) for span in inner.plan.cached]
    return [
        _short(called.get(use.key) or text or use.key)
        for use, text in zip(inner.documents, texts, strict=True)
    ]


def _short(text: str) -> str:
    """A label that leaves room for the picture; matplotlib would take a dollar sign for mathematics."""
    cut = text if len(text) <= _LABEL else f"{text[: _LABEL - 1].rstrip()}…"
    return cut.replace("$", r"\$")


def name_rows(axes: Axes, called: list[str]) -> None:
    """One row for each document, the first one at the top."""
    axes.set_yticks(range(len(called)), called)
    axes.set_ylim(len(called) - 0.5, -0.5)


def bare(axes: Axes) -> None:
    """Without the lines that frame nothing."""
    axes.spines[["top", "right"]].set_visible(False)

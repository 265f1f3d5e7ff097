"""Which tokens of a long conversation lie in which layers' memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvrag.errors import InputError
from kvrag.plots.drawing import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvrag.sessions.session import Session

_COLUMNS = 400  # no screen shows more of them


def memory(session: Session, *, tokens: tuple[int, int] | None = None, axes: Axes | None = None) -> Axes:
    """What a session's memory still holds, layer by layer, from the first token said to the last one.

    What is bright is held; where several tokens share a column of the picture, their mean is shown, over the
    heads of the layer. Pinned text always stays, and is not drawn.

    Args:
        session: in which something was said.
        tokens: draw these only, from the first to the one behind the last; None: all.
        axes: where to draw; None: a figure of its own.

    Raises:
        InputError: nothing was said yet, or there are no such tokens.
        MissingExtra: matplotlib is not installed.
    """
    held = session.held()
    num_layers, num_tokens = held.shape
    if not num_tokens:
        raise InputError("nothing was said in this session, so there is nothing to draw")
    first, end = tokens or (0, num_tokens)
    if not 0 <= first < end <= num_tokens:
        raise InputError(f"tokens is {tokens}; the conversation has those from 0 up to {num_tokens}")
    held = held[:, first:end]
    axes = axes_or_new(axes, 8, 1.1 + 0.3 * num_layers)
    image = axes.imshow(
        100 * _columns(held).numpy(),
        cmap="cividis",
        aspect="auto",
        vmin=0,
        vmax=100,
        interpolation="nearest",
        extent=(first, end, num_layers - 0.5, -0.5),
    )
    axes.set_xlabel("token of the conversation")
    axes.set_ylabel("layer")
    axes.locator_params(axis="y", integer=True)
    axes.figure.colorbar(image, ax=axes, label="held (%)")
    return axes


def _columns(held: torch.Tensor) -> torch.Tensor:
    """[L, columns]: means of neighbouring tokens."""
    num_tokens = held.shape[1]
    if num_tokens <= _COLUMNS:
        return held
    column = torch.arange(num_tokens) * _COLUMNS // num_tokens
    sums = torch.zeros(held.shape[0], _COLUMNS).index_add_(1, column, held)
    return sums / torch.bincount(column, minlength=_COLUMNS)

"""Rows that change their place, and how they are turned on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spin:
    """How keys are rotated per position.

    Attributes:
        frequencies: radians per position of each rotated pair, signed.
        start: first rotated dimension of the head.
        interleaved: pairs are neighbours (2i, 2i + 1); otherwise (i, i + R).
    """

    frequencies: tuple[float, ...]
    start: int = 0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Moving:
    """One tensor of rows in one layer.

    Attributes:
        layer: whose line of the sources counts.
        into: [K, n, D], written in place.
        held: [K, n', D], where old slots are read; often `into` itself, or the keys before their rotation.
        fresh: [K, q, D], the stride's rows, not rotated; same dtype.
        spin: None: rows stay as they are.
        is_turned: rows of `held` lie rotated at their slot, so they are turned by the difference of slots;
            otherwise by the slot they go to, as the stride's rows are always.
    """

    layer: int
    into: torch.Tensor
    held: torch.Tensor
    fresh: torch.Tensor
    spin: Spin | None = None
    is_turned: bool = False


@dataclass(frozen=True, slots=True)
class Places:
    """Which rows go where; all slots are read before any is written.

    Attributes:
        slots: [m], int64, without repetition: slots that are written, in all layers and heads.
        sources: [L, K or 1, m], int64: an old slot (below `num_before`), or `num_before` plus a fresh row.
        num_before: slots that `sources` counts from.
    """

    slots: torch.Tensor
    sources: torch.Tensor
    num_before: int

    def of(self, moving: Moving) -> torch.Tensor:
        """[K, m], expanded: the sources for every head of a layer."""
        return self.sources[moving.layer].expand(moving.into.shape[0], -1)


def check(rows: Sequence[Moving], places: Places) -> None:
    """Refuse what cannot be moved.

    Raises:
        ValueError: sizes or dtypes that do not fit each other.
    """
    num_moved = len(places.slots)
    for x in rows:
        heads, _, dim = x.into.shape
        if any(t.shape[::2] != (heads, dim) or t.dtype != x.into.dtype for t in (x.held, x.fresh)):
            raise ValueError(
                f"rows go from {list(x.held.shape)} and {list(x.fresh.shape)} to {list(x.into.shape)}: "
                "heads, dimensions and dtypes have to be the same"
            )
        if not 0 <= x.layer < len(places.sources) or places.sources.shape[1] not in (1, heads):
            raise ValueError(
                f"layer {x.layer} with {heads} heads has no sources in {list(places.sources.shape)}"
            )
        if places.sources.shape[2] != num_moved:
            raise ValueError(f"{num_moved} slots need as many sources, not {places.sources.shape[2]}")
        if x.spin is not None and x.spin.start + 2 * len(x.spin.frequencies) > dim:
            raise ValueError(
                f"{dim} dimensions have no {len(x.spin.frequencies)} pairs from {x.spin.start} on"
            )

"""What the update of a cascade gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CascadeUpdate:
    """Where everything lies after new tokens were inserted; slots that are not named stay as they are.

    Attributes:
        slots: [m], int64, ascending: ring slots that an insertion touched, the same in all layers and heads.
        sources: [L, K, m], int64: what lies there now: a ring slot of before (below C * W, perhaps the slot
            itself), or C * W plus a row of the new tokens.
        stored: how many entries each sub-cache has now.
        start: place of each sub-cache's oldest entry now, within its W slots.
    """

    slots: torch.Tensor
    sources: torch.Tensor
    stored: tuple[int, ...]
    start: tuple[int, ...]

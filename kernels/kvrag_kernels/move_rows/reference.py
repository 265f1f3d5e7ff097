"""Moving rows in plain PyTorch: gather, rotate, write."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.move_rows.types import Moving, Places, Spin
from kvrag_kernels.turning import Turn, turn_query


def move_rows_reference(rows: Sequence[Moving], places: Places) -> None:
    """Move one tensor after the other; see `move_rows` for the arguments."""
    for layer in dict.fromkeys(x.layer for x in rows):
        mine = [x for x in rows if x.layer == layer]
        found = [gathered(x, places) for x in mine]  # before anything of this layer is written
        for x, new in zip(mine, found, strict=True):
            x.into[:, places.slots] = new


def gathered(moving: Moving, places: Places) -> torch.Tensor:
    """[K, m, D]: rows as they are to lie in their new slots; a copy."""
    sources = places.of(moving)
    is_fresh = sources >= places.num_before
    taken = _picked(moving.fresh, torch.where(is_fresh, sources - places.num_before, 0))
    if moving.held.shape[1]:
        old = _picked(moving.held, torch.where(is_fresh, 0, sources))
        taken = old if not moving.fresh.shape[1] else torch.where(is_fresh[..., None], taken, old)
    if moving.spin is None:
        return taken
    lies = torch.where(is_fresh, 0, sources) if moving.is_turned else torch.zeros_like(sources)
    return turned(taken, moving.spin, places.slots - lies)


def _picked(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[K, m, D]; zeros if there is nothing to pick from."""
    if not rows.shape[1]:
        return rows.new_zeros((*places.shape, rows.shape[2]))
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


def turned(rows: torch.Tensor, spin: Spin, distances: torch.Tensor) -> torch.Tensor:
    """Rows [K, m, D], each turned by its distance [K, m] in positions; angles in float64."""
    frequencies = torch.tensor(spin.frequencies, dtype=torch.float64, device=rows.device)
    angles = distances.reshape(1, -1, 1).double() * frequencies
    turn = Turn(angles.cos().float(), angles.sin().float(), spin.start, spin.interleaved)
    return turn_query(rows.reshape(1, 1, -1, rows.shape[2]), turn, 1).view(rows.shape)

"""Moving rows in plain PyTorch: gather, rotate, write."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag_kernels.move_rows.types import Moving, Places, Spin
from kvrag_kernels.turning import Turn, turn_query


def move_rows_reference(rows: Sequence[Moving], places: Places) -> None:
    """Move one tensor after the other; see `move_rows` for the arguments."""
    at_slots: dict[Spin, Turn] = {}  # turns by the slots themselves, which layers have in common
    for layer in dict.fromkeys(x.layer for x in rows):
        mine = [x for x in rows if x.layer == layer]
        come = _Sources(places.sources[layer], places.num_before)
        found = [_gathered(x, come, places.slots, at_slots) for x in mine]  # before any of it is written
        for x, new in zip(mine, found, strict=True):
            x.into[:, places.slots] = new


class _Sources:
    """Where a layer's rows come from; what several tensors read alike is read once."""

    def __init__(self, sources: torch.Tensor, num_before: int) -> None:
        """Take the layer's sources, [K or 1, m]."""
        is_fresh = sources >= num_before
        self.all_fresh = bool(is_fresh.all())
        self.old = torch.where(is_fresh, 0, sources)
        self._is_fresh, self._new = is_fresh, torch.where(is_fresh, sources - num_before, 0)
        self._taken: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, moving: Moving) -> torch.Tensor:
        """[K, m, D]: rows as they lie at their sources; not to be written to."""
        key = id(moving.held), id(moving.fresh)
        if key not in self._taken:
            self._taken[key] = self._picked(moving)
        return self._taken[key]

    def _picked(self, moving: Moving) -> torch.Tensor:
        if self.all_fresh:
            return _picked(moving.fresh, self._new)
        old = _picked(moving.held, self.old)
        if not moving.fresh.shape[1]:
            return old
        return torch.where(self._is_fresh[..., None], _picked(moving.fresh, self._new), old)


def _gathered(
    moving: Moving, come: _Sources, slots: torch.Tensor, at_slots: dict[Spin, Turn]
) -> torch.Tensor:
    """[K, m, D]: rows as they are to lie in their new slots."""
    taken = come.take(moving)
    if moving.spin is None:
        return taken
    if come.all_fresh or not moving.is_turned:
        if moving.spin not in at_slots:
            at_slots[moving.spin] = turn_by(moving.spin, slots)
        return turn_query(taken[None], at_slots[moving.spin], 1)[0, 0]
    return turned(taken, moving.spin, (slots - come.old).expand(len(taken), -1))


def _picked(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[K, m, D] of places [K or 1, m]; zeros if there is nothing to pick from."""
    every = places.expand(len(rows), -1)
    heads, num_rows, dim = rows.shape
    if not num_rows:
        return rows.new_zeros((*every.shape, dim))
    head, row, channel = rows.stride()
    if channel != 1 or not row or head % row:
        return rows.gather(1, every[..., None].expand(-1, -1, dim))
    # All heads as rows of one table: picking whole rows is several times as fast as picking elements.
    apart = head // row
    flat = rows.as_strided((apart * (heads - 1) + num_rows, dim), (row, 1))
    at = every + torch.arange(0, apart * heads, max(1, apart), device=every.device)[:heads, None]
    return flat.index_select(0, at.reshape(-1)).view(*every.shape, dim)


def turn_by(spin: Spin, distances: torch.Tensor) -> Turn:
    """The turn by each distance [m] in positions; angles in float64."""
    frequencies = torch.tensor(spin.frequencies, dtype=torch.float64, device=distances.device)
    angles = distances[None, :, None].double() * frequencies
    return Turn(angles.cos().float(), angles.sin().float(), spin.start, spin.interleaved)


def turned(rows: torch.Tensor, spin: Spin, distances: torch.Tensor) -> torch.Tensor:
    """Rows [K, m, D], each turned by its distance [K, m] in positions."""
    turn = turn_by(spin, distances.reshape(-1))
    return turn_query(rows.reshape(1, 1, -1, rows.shape[2]), turn, 1).view(rows.shape)

"""Hands a stride's events to the Triton kernel, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvrag_kernels.cascade_update import kernel
from kvrag_kernels.cascade_update.events import Ints, LevelEvents, cascade_events
from kvrag_kernels.cascade_update.types import CascadeUpdate

_SEGMENTS = 16


@dataclass(frozen=True, slots=True)
class _Plan:
    """All levels' integers in one tensor, so that a stride costs one copy to the device.

    Attributes:
        numbers: on the device.
        parts: per level where residents, segments' beginnings and places begin in it, in this order.
        residents: per level, how many ring slots stand in front of what arrives.
        longest: per level, items of the longest segment.
        slots: ring slots that were touched, ascending.
    """

    numbers: torch.Tensor
    parts: list[list[int]]
    residents: list[int]
    longest: list[int]
    slots: torch.Tensor


def _plan(levels: Sequence[LevelEvents], num_new: int, device: torch.device) -> _Plan:
    arrays: list[Ints] = [np.concatenate([np.sort(events.kept) for events in levels])]
    parts, residents, longest = [], [], []
    num_items, leaving, num_kept = num_new, np.zeros(0, dtype=np.int64), 0
    for events in levels:
        newest = np.array([events.newest] if events.newest >= 0 else [], dtype=np.int64)
        mine = np.concatenate([newest, leaving])
        firsts = np.append(events.firsts, len(newest) + num_items)
        places = np.full(len(events.firsts), -1, dtype=np.int64)
        places[events.kept_from :][np.argsort(events.kept)] = num_kept + np.arange(len(events.kept))
        begin = sum(map(len, arrays))
        parts.append([begin, begin + len(mine), begin + len(mine) + len(firsts)])
        arrays += [mine, firsts, places]
        residents.append(len(mine))
        longest.append(int(np.diff(firsts).max(initial=0)))
        num_kept += len(events.kept)
        leaving, num_items = events.leaving, len(events.leaving) + events.num_leaving
    numbers = torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)
    return _Plan(numbers, parts, residents, longest, numbers[:num_kept])


def cascade_update_triton(
    scores: torch.Tensor,
    fresh: torch.Tensor,
    stored: Sequence[int],
    start: Sequence[int],
    arrived: int,
    *,
    periods: Sequence[int],
    width: int,
    eager: bool = True,
) -> CascadeUpdate:
    """Insert all new tokens in one launch per level; see `cascade_update` for the arguments."""
    layers, heads, capacity = scores.shape
    num_new, num_heads, device = fresh.shape[-1], layers * heads, scores.device
    levels = cascade_events(stored, start, arrived, num_new, periods=periods, width=width, eager=eager)
    plan = _plan(levels, num_new, device)
    exact = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
    flat = scores.reshape(num_heads, capacity).to(exact).contiguous()
    # What arrives: new tokens lie head by head, what a level pushes out lies item by item.
    arriving, steps = fresh.reshape(num_heads, num_new).to(exact).contiguous(), (1, num_new)
    sources = plan.numbers
    kept = torch.empty((num_heads, len(plan.slots)), dtype=torch.int64, device=device)
    lanes = min(64, 1 << (num_heads - 1).bit_length()) if num_heads else 1
    for level, (events, parts) in enumerate(zip(levels, plan.parts, strict=True)):
        num_segments = len(events.firsts)
        best = torch.empty((events.num_leaving, num_heads), dtype=torch.int64, device=device)
        best_scores = torch.empty((events.num_leaving, num_heads), dtype=exact, device=device)
        grid = (-(-num_segments // _SEGMENTS), -(-num_heads // lanes))
        if all(grid):
            kernel.play_level[grid](
                *(plan.numbers[i:] for i in parts), flat, sources, arriving, best, best_scores, kept,
                capacity, *steps, plan.residents[level], num_segments, events.num_leaving, len(plan.slots),
                plan.longest[level], capacity, num_heads,
                IS_FIRST=level == 0, SEGMENTS=_SEGMENTS, HEADS=lanes,
            )  # fmt: skip
        sources, arriving, steps = best, best_scores, (num_heads, 1)
    return CascadeUpdate(
        plan.slots,
        kept.view(layers, heads, len(plan.slots)),
        tuple(events.stored for events in levels),
        tuple(events.start for events in levels),
    )

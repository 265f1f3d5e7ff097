"""The cascade's insertion as a tournament: all layers, heads and tokens of a level at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvrag_kernels.cascade_update.events import Ints, LevelEvents, cascade_events, rounds
from kvrag_kernels.cascade_update.types import CascadeUpdate


@dataclass(frozen=True, slots=True)
class _Items:
    """Entries in order, and all heads' views of them.

    Heads lie innermost, so that choosing entries copies rows.

    Attributes:
        sources: [E, H], or [E, 1] where all heads agree: ring slots, or C * W plus a new row.
        scores: [E, H].
    """

    sources: torch.Tensor
    scores: torch.Tensor

    def __len__(self) -> int:
        return self.scores.shape[0]

    def part(self, first: int, end: int) -> _Items:
        return _Items(self.sources[first:end], self.scores[first:end])

    def pick(self, places: torch.Tensor) -> _Items:
        return _Items(self.sources.index_select(0, places), self.scores.index_select(0, places))


def _joined(items: Sequence[_Items]) -> _Items:
    items = [x for x in items if len(x)] or list(items[:1])
    if len(items) == 1:
        return items[0]
    heads = max(x.sources.shape[1] for x in items)
    sources = torch.cat([x.sources.expand(-1, heads) for x in items])
    return _Items(sources, torch.cat([x.scores for x in items]))


def _residents(scores: torch.Tensor, slots: Ints) -> _Items:
    """What lies in some ring slots; `scores` is [H, C * W]."""
    places = torch.from_numpy(slots).to(scores.device)
    # index_select would first copy all scores if they are a part of something larger.
    return _Items(places[:, None], scores[:, places].t())


def _last_best(items: _Items, firsts: Ints) -> _Items:
    """The last of the best of every segment, for every head."""
    for earlier, later in rounds(firsts, len(items)):
        one, other = (items.pick(torch.from_numpy(x).to(items.scores.device)) for x in (earlier, later))
        wins = other.scores >= one.scores
        items = _Items(
            torch.where(wins, other.sources, one.sources), torch.where(wins, other.scores, one.scores)
        )
    return items


def _through(events: LevelEvents, arriving: _Items, scores: torch.Tensor) -> tuple[_Items, _Items]:
    """What a level keeps in the slots that change, and what it pushes out."""
    if events.newest >= 0:
        arriving = _joined([_residents(scores, np.array([events.newest])), arriving])
    best = _last_best(arriving, events.firsts)
    pushed = _joined([_residents(scores, events.leaving), best.part(0, events.num_leaving)])
    return best.part(events.kept_from, len(best)), pushed


def cascade_update_vectorised(
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
    """Insert all new tokens at once; see `cascade_update` for the arguments."""
    layers, heads, capacity = scores.shape
    num_new, device = fresh.shape[-1], scores.device
    levels = cascade_events(stored, start, arrived, num_new, periods=periods, width=width, eager=eager)
    flat = scores.reshape(layers * heads, capacity)
    rows = torch.arange(capacity, capacity + num_new, device=device)
    arriving = _Items(rows[:, None], fresh.reshape(layers * heads, num_new).t())
    kept = []
    for events in levels:
        mine, arriving = _through(events, arriving, flat)
        kept.append(mine.sources)
    slots, sources = _in_slot_order(levels, kept, layers * heads)
    return CascadeUpdate(
        torch.from_numpy(slots).to(device),
        sources.view(layers, heads, len(slots)),
        tuple(events.stored for events in levels),
        tuple(events.start for events in levels),
    )


def _in_slot_order(
    levels: Sequence[LevelEvents], kept: Sequence[torch.Tensor], heads: int
) -> tuple[Ints, torch.Tensor]:
    """Slots ascending, and the sources [H, m] that belong to them: a ring begins anew where slots fall."""
    slots, sources = [], []
    for events, mine in zip(levels, kept, strict=True):
        turn = int(np.argmin(events.kept)) if len(events.kept) else 0
        slots += [events.kept[turn:], events.kept[:turn]]
        sources += [mine[turn:], mine[:turn]]
    found = torch.empty((heads, sum(map(len, sources))), dtype=torch.int64, device=kept[0].device)
    end = 0
    for part in sources:
        found[:, end : (end := end + len(part))] = part.t()
    return np.concatenate(slots), found

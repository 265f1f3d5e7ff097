"""Looks on while a stride is read, and says what it attended to once the stride is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrag.backbone import AttentionCall
from kvrag.fresh import FreshRows
from kvrag.layout import Layout
from kvrag.memory.base import Run, Seen, Watching
from kvrag.rotary import LayerSpec
from kvrag.segments import SegmentTable
from kvrag_kernels import Scoring, Turn, column_scores, reduce_heads


@dataclass(frozen=True, slots=True)
class _Noted:
    """One layer's part of one pass."""

    row: int
    key: torch.Tensor
    query: torch.Tensor | None
    lse: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Form:
    """What is the same for all calls of a layer."""

    scale: float
    softcap: float | None


class Watch:
    """Keeps keys as they are before any rotation and, where a policy scores, queries and log-sum-exps.

    A stride may be read in several passes (pieces of a prompt, tokens of an answer); as long as nothing is
    inserted into the memory in between, `seen` is what one pass over all of it would have given.
    """

    def __init__(self, specs: Sequence[LayerSpec], watching: Watching | None) -> None:
        """Look on at a stride.

        Args:
            specs: of the model's layers.
            watching: how attention becomes scores; None: it is not looked at.
        """
        self._specs, self._watching = specs, watching
        self._noted: list[list[_Noted]] = [[] for _ in specs]
        self._forms: dict[int, _Form] = {}

    def note(self, layer: int, row: int, call: AttentionCall, lse: torch.Tensor) -> None:
        """See `kvrag.attention.Watches`."""
        noted = self._noted[layer]
        while noted and noted[-1].row >= row:
            noted.pop()
        # Copies: in a pass with others', views would keep everybody's rows.
        key = call.key[0].clone()
        if self._watching is None:
            noted.append(_Noted(row, key, None, None))
            return
        factor = self._specs[layer].score_factor(call.query.dtype)
        self._forms[layer] = _Form(call.scale * factor, call.softcap)
        noted.append(_Noted(row, key, call.query.clone(), lse.clone()))

    def cut(self, num_rows: int) -> None:
        """Forget what came behind the first rows."""
        for layer, noted in enumerate(self._noted):
            kept = [x for x in noted if x.row < num_rows]
            if kept and kept[-1].row + kept[-1].key.shape[1] > num_rows:
                kept[-1] = _head(kept[-1], num_rows - kept[-1].row)
            self._noted[layer] = kept

    def keys(self) -> list[torch.Tensor]:
        """The stride's keys of each layer, [K, q, D], not rotated."""
        return [torch.cat([x.key for x in noted], dim=1) for noted in self._noted]

    @torch.inference_mode()
    def seen(
        self, table: SegmentTable, memory: Sequence[Run], capacity: int, fresh: FreshRows
    ) -> Seen | None:
        """What the stride attended to; None if that is not looked at.

        Args:
            table: what it read, the memory's runs last.
            memory: those runs.
            capacity: slots of the memory.
            fresh: the stride's rows, and none before them.
        """
        if self._watching is None:
            return None
        positions = torch.tensor(fresh.positions, device=self._noted[0][0].key.device)
        scoring = Scoring(self._watching.weights(len(positions)).to(positions.device))
        runs = [run for run in memory if run.length]
        scored = _Scored(table, runs, capacity, positions, scoring, fresh)
        layers = [self._layer(layer, spec, scored, self._watching) for layer, spec in enumerate(self._specs)]
        return Seen(torch.stack([x for x, _ in layers]), torch.stack([x for _, x in layers]))

    def _layer(
        self, layer: int, spec: LayerSpec, scored: _Scored, watching: Watching
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[K or 1, capacity] and [K or 1, q] of one layer."""
        noted, form = self._noted[layer], self._forms[layer]
        query = torch.cat([x.query for x in noted if x.query is not None], dim=2)
        lse = torch.cat([x.lse for x in noted if x.lse is not None], dim=2)
        layout = scored.layout(spec)
        rows = layout.rows([s.kv.layers[layer] for s in scored.table], scored.fresh.rows(layer))
        first = len(rows) - 1 - len(scored.runs)
        found = column_scores(
            query,
            rows[first:],
            layout.turn and _turn_from(layout.turn, first),
            lse,
            scored.scoring,
            scale=form.scale,
            softcap=form.softcap,
        )
        reduced = reduce_heads(
            found, 1 if watching.homogeneous else noted[0].key.shape[0], watching.reduction
        )
        *parts, own = reduced.split([part.keys.shape[2] for part in rows[first:]], dim=1)
        slots = reduced.new_zeros((len(reduced), scored.capacity))
        for run, part in zip(scored.runs, parts, strict=True):
            # leading rows that a window has left behind are not among the columns
            end = run.slot + run.length
            slots[:, end - part.shape[1] : end] = part
        return slots, own


class _Scored:
    """What all layers have in common while scores are computed."""

    def __init__(
        self,
        table: SegmentTable,
        runs: Sequence[Run],
        capacity: int,
        positions: torch.Tensor,
        scoring: Scoring,
        fresh: FreshRows,
    ) -> None:
        self.table, self.runs, self.capacity = table, runs, capacity
        self.positions, self.scoring, self.fresh = positions, scoring, fresh
        self._layouts: dict[LayerSpec, Layout] = {}

    def layout(self, spec: LayerSpec) -> Layout:
        """Who sees what, for the whole stride as if it were read in one pass."""
        if spec not in self._layouts:
            self._layouts[spec] = Layout(spec, self.table.segments, self.positions, ())
        return self._layouts[spec]


def _head(noted: _Noted, num_rows: int) -> _Noted:
    query = None if noted.query is None else noted.query[:, :, :num_rows]
    lse = None if noted.lse is None else noted.lse[..., :num_rows]
    return _Noted(noted.row, noted.key[:, :num_rows], query, lse)


def _turn_from(turn: Turn, first: int) -> Turn:
    """The turns for the segments from `first` on."""
    return Turn(turn.cos[first:], turn.sin[first:], turn.start, turn.interleaved)

"""Looks on while a stride is read, and says what it attended to once the stride is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrag.attention import Layout, turn_of
from kvrag.backbone import AttentionCall
from kvrag.fresh import FreshRows
from kvrag.memory.base import Reduction, Run, Seen, Watching
from kvrag.rotary import LayerSpec
from kvrag.segments import SegmentTable
from kvrag_kernels import column_scores


@dataclass(frozen=True, slots=True)
class _Noted:
    """One layer's part of one pass."""

    row: int
    key: torch.Tensor
    query: torch.Tensor | None
    mass: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Form:
    """What is the same for all calls of a layer."""

    scale: float
    softcap: float | None


class Watch:
    """Keeps keys as they are before any rotation and, where a policy scores, queries and masses.

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

    def note(self, layer: int, row: int, call: AttentionCall, mass: torch.Tensor) -> None:
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
        noted.append(_Noted(row, key, call.query.clone(), mass[:, 0].clone()))

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
        weights = _weights(len(positions), self._watching.beta, positions.device)
        runs = [run for run in memory if run.length]
        scored = _Scored(table, runs, capacity, positions, weights, fresh)
        layers = [self._layer(layer, spec, scored, self._watching) for layer, spec in enumerate(self._specs)]
        return Seen(torch.stack([x for x, _ in layers]), torch.stack([x for _, x in layers]))

    def _layer(
        self, layer: int, spec: LayerSpec, scored: _Scored, watching: Watching
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[K or 1, capacity] and [K or 1, q] of one layer."""
        noted, form = self._noted[layer], self._forms[layer]
        query = torch.cat([x.query for x in noted if x.query is not None], dim=2)
        mass = torch.cat([x.mass for x in noted if x.mass is not None], dim=2)
        num_kv_heads = noted[0].key.shape[0]
        slots = query.new_zeros((query.shape[1], scored.capacity), dtype=torch.float32)
        layout = scored.layout(spec)
        rows = layout.rows([s.kv.layers[layer] for s in scored.table], scored.fresh.rows(layer))
        first = len(rows) - 1 - len(scored.runs)
        own = torch.zeros(0)
        for i, part in enumerate(rows[first:], start=first):
            found = column_scores(
                query,
                part,
                layout.turn and turn_of(layout.turn, i),
                mass[i, None],
                scored.weights,
                scale=form.scale,
                softcap=form.softcap,
            )
            if i == len(rows) - 1:
                own = found
            else:  # leading rows that a window has left behind are not among the columns
                end = scored.runs[i - first].slot + scored.runs[i - first].length
                slots[:, end - found.shape[1] : end] = found
        groups = 1 if watching.homogeneous else num_kv_heads
        return _reduced(slots, groups, watching.reduction), _reduced(own, groups, watching.reduction)


class _Scored:
    """What all layers have in common while scores are computed."""

    def __init__(
        self,
        table: SegmentTable,
        runs: Sequence[Run],
        capacity: int,
        positions: torch.Tensor,
        weights: torch.Tensor,
        fresh: FreshRows,
    ) -> None:
        self.table, self.runs, self.capacity = table, runs, capacity
        self.positions, self.weights, self.fresh = positions, weights, fresh
        self._layouts: dict[LayerSpec, Layout] = {}

    def layout(self, spec: LayerSpec) -> Layout:
        """Who sees what, for the whole stride as if it were read in one pass."""
        if spec not in self._layouts:
            self._layouts[spec] = Layout(spec, self.table.segments, self.positions, ())
        return self._layouts[spec]


def _head(noted: _Noted, num_rows: int) -> _Noted:
    query = None if noted.query is None else noted.query[:, :, :num_rows]
    mass = None if noted.mass is None else noted.mass[..., :num_rows]
    return _Noted(noted.row, noted.key[:, :num_rows], query, mass)


def _weights(num_rows: int, beta: float, device: torch.device) -> torch.Tensor:
    """[q], float32: (1 - beta) beta^(q-1-j), computed in float64 because beta is close to one."""
    back = torch.arange(num_rows - 1, -1, -1, dtype=torch.float64)
    return ((1 - beta) * beta**back).float().to(device)


def _reduced(scores: torch.Tensor, groups: int, reduction: Reduction) -> torch.Tensor:
    """[groups, n]: [H, n] over the heads of each group; of an even number, the lower one is the median."""
    grouped = scores.reshape(groups, -1, scores.shape[1])
    if reduction == "mean":
        return grouped.mean(1)
    if reduction == "max":
        return grouped.amax(1)
    return grouped.median(1).values

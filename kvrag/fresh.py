"""Rows of the tokens that one request reads itself: its question, its answer, what it reads again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import Segment, SegmentTable
from kvrag_kernels import Parts, Turn


class FreshRows:
    """Keys and values of the tokens read in this request, layer by layer, at their own positions.

    Keys are rotated at their absolute positions. Buffers grow by doubling, so a decode step copies nothing.

    Attributes:
        positions: of all rows.
        parts: the rows that were copied from each segment of a table; None if none were.
        standing: rows that stand for hidden rows of a document, by its number: the first of them.
    """

    def __init__(self, num_layers: int, *, reserve: int = 64) -> None:
        """Make room for `reserve` tokens per layer; more is made when needed."""
        self.positions: list[int] = []
        self.parts: Parts | None = None
        self.standing: dict[int, int] = {}
        self._reserve = reserve
        self._buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._counts = [0] * num_layers

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add rows to one layer and return all of its rows.

        Args:
            layer: number of the layer.
            keys: [1, K, T, D], rotated.
            values: [1, K, T, Dv].

        Returns:
            [1, K, n, D] and [1, K, n, Dv], views that stay valid until the next append.
        """
        start = self._counts[layer]
        end = start + keys.shape[2]
        buffers = self._buffers[layer]
        if buffers is None or buffers[0].shape[2] < end:
            buffers = self._grow(buffers, keys, values, start, max(end + self._reserve, 2 * start))
            self._buffers[layer] = buffers
        buffers[0][:, :, start:end] = keys
        buffers[1][:, :, start:end] = values
        self._counts[layer] = end
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def hold(self, num_rows: int) -> None:
        """Make room for so many more rows in every layer; until then the buffers stay where they are."""
        for layer, buffers in enumerate(self._buffers):
            if buffers is None:
                raise ValueError("nothing was read yet")
            end = self._counts[layer] + num_rows
            if buffers[0].shape[2] < end:
                self._buffers[layer] = self._grow(buffers, *buffers, self._counts[layer], end)

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's whole buffers, [1, K, room, D] and [1, K, room, Dv]; the first rows mean something."""
        buffers = self._buffers[layer]
        if buffers is None:
            raise ValueError(f"nothing was read in layer {layer}")
        return buffers

    @staticmethod
    def together(several: Sequence[FreshRows], num_rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Let requests' rows lie in common buffers with room for at least so many more rows of each.

        Returns:
            Per layer, keys [B, K, room, D] and values [B, K, room, Dv], of which each request has its part.
        """
        if len(several) == 1:
            several[0].hold(num_rows)
            return [several[0].held(layer) for layer in range(len(several[0]._counts))]
        found = []
        for layer in range(len(several[0]._counts)):
            rows = [fresh.rows(layer) for fresh in several]
            room = max(keys.shape[2] for keys, _ in rows) + num_rows
            buffers = [x.new_empty((len(rows), x.shape[1], room, x.shape[3])) for x in rows[0]]
            for i, (fresh, own) in enumerate(zip(several, rows, strict=True)):
                for buffer, x in zip(buffers, own, strict=True):
                    buffer[i, :, : x.shape[2]] = x[0]
                fresh._buffers[layer] = (buffers[0][i : i + 1], buffers[1][i : i + 1])
            found.append((buffers[0], buffers[1]))
        return found

    def took(self, position: int) -> None:
        """Count a row that was written to the buffers of all layers."""
        self._counts = [count + 1 for count in self._counts]
        self.positions.append(position)

    def cut(self, num_rows: int) -> None:
        """Keep the first `num_rows` only; also of what a pass that failed added to some layers."""
        self._counts = [min(count, num_rows) for count in self._counts]
        del self.positions[num_rows:]

    @property
    def device(self) -> torch.device | None:
        """Where the rows are; None before the first was read."""
        return self._buffers[0][0].device if self._buffers and self._buffers[0] is not None else None

    @property
    def num_rows(self) -> int:
        """Rows of the first layer."""
        return self._counts[0]

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, K, n, D] and [1, K, n, Dv]: one layer's rows, views."""
        buffers = self._buffers[layer]
        if buffers is None:
            raise ValueError(f"nothing was read in layer {layer}")
        num = self._counts[layer]
        return buffers[0][:, :, :num], buffers[1][:, :, :num]

    def values(self, layer: int) -> torch.Tensor:
        """[K, n, Dv]: the values of one layer's rows, a view."""
        return self.rows(layer)[1][0]

    def behind(self, table: SegmentTable, specs: Sequence[LayerSpec]) -> FreshRows:
        """These rows behind a copy of the table's, all in one run per layer, keys turned to their places.

        One run is attended to in one call; worth its copy once many tokens are decoded over the same table.
        Every layer has to read every segment. The copy remembers in `parts` where each segment's rows end;
        rows that stand for hidden ones take their places there.
        """
        merged = FreshRows(len(specs), reserve=self._reserve)
        ends = list(accumulate(s.kv.num_tokens for s in table))
        device = table.segments[0].kv.device
        merged.parts = Parts(ends, device=device)
        stood = [(s, end, self._stood(s)) for s, end in zip(table, ends, strict=True)]
        taken = {row for _, _, rows in stood for row in rows}
        left = torch.tensor([i for i in range(self.num_rows) if i not in taken], device=device)
        merged.positions = [p for s in table for p in range(s.target, s.end)]
        merged.positions += [self.positions[i] for i in left]
        turns = {spec: _turns(spec, table) for spec in dict.fromkeys(specs)}
        total = ends[-1] + len(left)
        for layer, spec in enumerate(specs):
            own = self._buffers[layer]
            if own is None:
                raise ValueError("nothing was read yet")
            keys, values = self._grow(None, own[0], own[1], 0, total + self._reserve)
            for (segment, end, rows), turn in zip(stood, turns[spec], strict=True):
                kv, start = segment.kv.layers[layer], end - segment.kv.num_tokens
                keys[0, :, start:end] = rotate(kv.keys[None], turn)[0]
                values[0, :, start:end] = kv.values
                if rows:
                    places = [start + row for row in segment.hidden]
                    keys[:, :, places], values[:, :, places] = own[0][:, :, rows], own[1][:, :, rows]
            keys[:, :, ends[-1] : total] = own[0][:, :, left]
            values[:, :, ends[-1] : total] = own[1][:, :, left]
            merged._buffers[layer] = (keys, values)
            merged._counts[layer] = total
        return merged

    def _stood(self, segment: Segment) -> list[int]:
        """The rows that stand for a segment's hidden ones."""
        if not segment.hidden or segment.document is None:
            return []
        start = self.standing[segment.document]
        return list(range(start, start + len(segment.hidden)))

    @staticmethod
    def _grow(
        old: tuple[torch.Tensor, torch.Tensor] | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        used: int,
        capacity: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_keys = keys.new_empty((*keys.shape[:2], capacity, keys.shape[3]))
        new_values = values.new_empty((*values.shape[:2], capacity, values.shape[3]))
        if old is not None:
            new_keys[:, :, :used] = old[0][:, :, :used]
            new_values[:, :, :used] = old[1][:, :, :used]
        return new_keys, new_values


def _turns(spec: LayerSpec, table: SegmentTable) -> list[Turn | None]:
    """How each segment's keys are turned from where they lie to where they appear: one angle for all rows."""
    if spec.rotation is None:
        return [None] * len(table)
    return [spec.rotation.turn(torch.tensor([s.shift], device=s.kv.device)) for s in table]

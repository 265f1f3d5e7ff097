"""One request's look at its documents: scores, who is dropped, where the others stand, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvrag.compose import Arrangement
from kvrag.focus.placement import Placed, Placement
from kvrag.focus.pruning import Pruning
from kvrag.focus.together import groups_of, scores_of
from kvrag.segments import SegmentTable


class Focus:
    """Decides, while a question is read, what each layer reads (see `kvrag.attention.Tables`).

    Before each layer: prune by the scores of the layers before, give the survivors positions, attend
    (CacheFocus, sec. 3 and 4). The query stays where it is.

    Args:
        arrangement: documents placed where `placed` has them.
        placed: positions of all documents; None for documents left out.
        placement: where survivors go.
        pruning: who goes; None: nobody.
        capacity: positions available to documents.
        num_layers: of the model.

    Attributes:
        scores: running score of each document of the arrangement, in its order.
        dropped_at: for documents by number, the layer from which on they are not read.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        placed: Placed,
        *,
        placement: Placement,
        pruning: Pruning | None,
        capacity: int,
        num_layers: int,
    ) -> None:
        self._composed = arrangement.composed()
        self._table = self._composed.table
        self._units = {unit.number: unit for unit in arrangement.units}
        self._placement, self._pruning = placement, pruning
        self._start, self._capacity, self._num_layers = arrangement.start, capacity, num_layers
        self._placed = placed
        self._documents = [unit.number for unit in arrangement.units]
        self._rows = [i for i, s in enumerate(self._table) if s.document is not None]
        self._together = pruning.together if pruning is not None else None
        self._groups = groups_of([unit.source for unit in arrangement.units], self._together)
        self._left = list(range(len(self._groups)))  # places in `_groups`
        self.scores = [0.0] * len(self._documents)
        self.survivors = list(range(len(self._documents)))  # places in `_documents`
        self.dropped_at: dict[int, int] = {}
        self._history: list[SegmentTable] = []

    def at(self, layer: int) -> SegmentTable:
        """Prune, place, and give the table of this layer."""
        if self._pruning is not None:
            gone = self._pruning.dropped(
                layer, self._num_layers, self._left, self.group_scores(), len(self._groups)
            )
            if gone:
                self._drop(gone, layer)
        self._history.append(self._table)
        return self._table

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        """Add a layer's scores."""
        if self._pruning is None or not self._rows:
            return
        first = max(0, mass.shape[-1] - self._num_question_rows)
        rows = torch.tensor(self._rows, device=mass.device)
        added = self._pruning.scorer.score(layer, mass[rows, first:], focus[rows, first:])
        self.scores = [s + a for s, a in zip(self.scores, added, strict=True)]

    @property
    def _num_question_rows(self) -> int:
        return len(self._composed.tokens) - self._composed.question

    def group_scores(self) -> list[float]:
        """Running score of each group of documents that share their fate, in order of its first document."""
        return scores_of(self.scores, self._groups, self._together)

    def _drop(self, groups: Sequence[int], layer: int) -> None:
        gone = {i for group in groups for i in self._groups[group]}
        self._left = [group for group in self._left if group not in groups]
        self.survivors = [i for i in self.survivors if i not in gone]
        numbers = [self._documents[i] for i in sorted(gone)]
        pairs = zip(self.group_scores(), self._groups, strict=True)
        joint = {i: score for score, group in pairs for i in group}
        self.dropped_at |= dict.fromkeys(numbers, layer)
        table = self._table.without(numbers, from_layer=layer)
        lengths = [self._units[number].length for number in self._documents]
        self._placed = self._placement.after(
            self._placed,
            lengths,
            start=self._start,
            capacity=self._capacity,
            survivors=self.survivors,
            scores=[joint[i] for i in range(len(joint))],
        )
        starts = dict(zip(self._documents, self._placed.starts, strict=True))
        self._table = SegmentTable(
            tuple(
                s if s.document is None or (at := starts[s.document]) is None else replace(s, target=at)
                for s in table
            )
        )

    @property
    def tables(self) -> tuple[SegmentTable, ...]:
        """What each layer read, of those that have attended."""
        return tuple(self._history)

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the documents that were not dropped."""
        return tuple(self._documents[i] for i in self.survivors)

    def final(self) -> SegmentTable:
        """What decoding reads: the survivors in all layers, at their last places (CacheFocus, sec. 3)."""
        table = self._table
        survivors = set(self.kept)
        return SegmentTable(
            tuple(
                replace(s, until_layer=None) for s in table if s.document is None or s.document in survivors
            )
        )

    def everyone(self) -> SegmentTable:
        """Every document in all layers, at its last place."""
        return SegmentTable(tuple(replace(s, until_layer=None) for s in self._table))

    def layers(self) -> Staircase:
        """The survivors at the places where each layer read them, for decoding."""
        gone = tuple(self.dropped_at)
        return Staircase(tuple(table.without(gone) for table in self._history))

    def starts(self) -> dict[int, int | None]:
        """Last position of every document, by number."""
        return dict(zip(self._documents, self._placed.starts, strict=True))


class Staircase:
    """A table of its own for each layer; the same segments at different places (see `Tables`)."""

    def __init__(self, tables: Sequence[SegmentTable]) -> None:
        """Take one table per layer."""
        self._tables = tuple(tables)

    def seen_from(self, row: int) -> Staircase:
        """The tables for fresh rows from `row` on."""
        return Staircase([table.seen_from(row) for table in self._tables])

    def at(self, layer: int) -> SegmentTable:
        """The table of a layer."""
        return self._tables[layer]

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        """Nothing depends on it."""

"""What an answer rests on: the attention that each document got, and where in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_SPAN = 12


@dataclass(frozen=True, slots=True)
class Span:
    """The place inside a document that was looked at most.

    Attributes:
        start: first row.
        end: row after the last.
        text: what stands there.
        mass: attention that these rows got, mean over layers, heads and rows that looked.
    """

    start: int
    end: int
    text: str
    mass: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer made of one document while the question was read.

    Attributes:
        start: position at which the document's first row appeared.
        mass: its share of the attention, mean over heads and the question's rows.
        focus: the same for squared masses.
    """

    start: int
    mass: float
    focus: float


class Attention:
    """Adds up what the rows that chose an answer's tokens looked at."""

    def __init__(self) -> None:
        self._rows = 0
        self._mass: dict[int, float] = {}
        self._focus: dict[int, float] = {}
        self._columns: dict[int, torch.Tensor] = {}

    def add(
        self,
        documents: Sequence[int | None],
        mass: torch.Tensor,
        focus: torch.Tensor,
        columns: Mapping[int, Sequence[torch.Tensor]],
    ) -> None:
        """Count one row.

        Args:
            documents: [S], number of each segment's document; None for the prefix.
            mass: [L, S], attention to each segment.
            focus: [L, S], squared attention.
            columns: by layer, [n] for each segment.
        """
        self._rows += 1
        means, squares = mass.mean(0).tolist(), focus.mean(0).tolist()
        for i, number in enumerate(documents):
            if number is None:
                continue
            self._mass[number] = self._mass.get(number, 0.0) + means[i]
            self._focus[number] = self._focus.get(number, 0.0) + squares[i]
            if columns:
                seen = torch.stack([layer[i] for layer in columns.values()]).mean(0)
                known = self._columns.get(number)
                self._columns[number] = seen if known is None else known + seen

    def mass(self, number: int) -> float:
        """Mean attention mass of a document."""
        return self._mass.get(number, 0.0) / max(1, self._rows)

    def focus(self, number: int) -> float:
        """A document's share of all documents' squared attention."""
        return self._focus.get(number, 0.0) / (sum(self._focus.values()) or 1.0)

    def span(self, number: int) -> tuple[int, int, float] | None:
        """First row, row after the last, and mass of the strongest place in a document.

        The first row is left out: a document that was encoded on its own has its attention sink there.
        """
        columns = self._columns.get(number)
        if columns is None or len(columns) < 2:
            return None
        width = min(_SPAN, len(columns) - 1)
        sums = columns[1:].unfold(0, width, 1).sum(-1)
        start = int(sums.argmax())
        return start + 1, start + 1 + width, float(sums[start]) / max(1, self._rows)

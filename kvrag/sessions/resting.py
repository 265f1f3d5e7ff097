"""What a turn's answer rests on: the attention that each pinned document got."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag.answer import DocumentUse
from kvrag.citations import Attention
from kvrag.decode import Step
from kvrag.sessions.pinned import Pinned


class Resting:
    """Adds up for one turn what the pinned documents got, as it is done for the documents of a prompt.

    Attributes:
        documents: number of the document that each pinned segment is; None for text around them.
    """

    def __init__(self, pinned: Pinned, asked: Sequence[torch.Tensor]) -> None:
        """Begin behind the user's message.

        Args:
            pinned: what stands in front.
            asked: what the message looked at, pass by pass [L, P, T]; see `MemoryReader.pinned_mass`.
        """
        self._pinned = pinned
        self._attention = Attention()
        self.documents = tuple(segment.document for segment in pinned.table)
        means = torch.cat([part.mean(0) for part in asked], dim=1).mean(1).tolist() if asked else []
        self._question: dict[int, float] = {}
        for number, mean in zip(self.documents, means, strict=False):  # none were noted, or all
            if number is not None:
                self._question[number] = self._question.get(number, 0.0) + mean

    def note(self, step: Step) -> None:
        """Count the row that chose a token."""
        if self._pinned.keys:
            self._attention.add(step.documents, step.mass, step.focus, step.columns)

    def uses(self, *, is_new: bool) -> tuple[DocumentUse, ...]:
        """The documents, in the order in which they stand.

        Args:
            is_new: they were pinned for this turn; later ones have their rows in any case.
        """
        lengths = {s.document: s.kv.num_tokens for s in self._pinned.table if s.document is not None}
        return tuple(
            DocumentUse(
                key,
                lengths[number],
                self._pinned.is_hit[number] or not is_new,
                self._attention.mass(number),
                self._attention.focus(number),
                self._question.get(number, 0.0),
            )
            for number, key in enumerate(self._pinned.keys)
        )

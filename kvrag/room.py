"""The positions of a prompt: what the question leaves to documents, and where these stand at first."""

from __future__ import annotations

from dataclasses import dataclass

from kvrag.compose import Arrangement
from kvrag.errors import ContextOverflow
from kvrag.focus.placement import Placed, Placement


@dataclass(frozen=True, slots=True)
class Room:
    """Positions of a prompt.

    Attributes:
        limit: positions that the model was trained for, or is used with.
        capacity: of those, how many documents may take.
    """

    limit: int
    capacity: int

    @classmethod
    def of(cls, arrangement: Arrangement, placement: Placement, max_length: int, max_new_tokens: int) -> Room:
        """What the question leaves to documents.

        Documents that fit as the placement lays them get what they need, and the answer the rest; others
        leave room for the answer, at most an eighth of all positions.

        Raises:
            ContextOverflow: prefix and question alone leave no room for an answer.
        """
        limit = placement.limit(max_length)
        fixed = arrangement.start + len(arrangement.question)
        if fixed + 1 > limit:
            raise ContextOverflow(
                f"the prompt has {fixed} tokens without its documents and the model reads {limit}; shorten it"
            )
        total = fixed + placement.span([unit.length for unit in arrangement.units])
        answer = 1 if total < limit else max(1, min(max_new_tokens, limit // 8))
        return cls(limit, limit - fixed - answer)


def place(arrangement: Arrangement, placement: Placement, capacity: int) -> tuple[Arrangement, Placed]:
    """The documents at the positions that a placement gives them, without those it leaves out."""
    lengths = [unit.length for unit in arrangement.units]
    if not lengths:
        return arrangement, Placed((), arrangement.query)
    placed = placement.first(lengths, start=arrangement.start, capacity=capacity)
    starts = dict(zip((u.number for u in arrangement.units), placed.starts, strict=True))
    left = tuple(start for start in placed.starts if start is not None)
    return arrangement.placed(starts, placed.query), Placed(left, placed.query)

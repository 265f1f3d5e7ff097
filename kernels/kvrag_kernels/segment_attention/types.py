"""What segment attention is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import torch

from kvrag_kernels.turning import Turn

__all__ = ["Attended", "Group", "RowMask", "Rows", "Turn"]


@dataclass(frozen=True)
class RowMask:
    """Which rows of a segment each query row sees; remembers what is derived from it.

    Attributes:
        allowed: [T, n], bool.
    """

    allowed: torch.Tensor
    _made: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)

    def additive(self, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, groups * T, n]: 0 where allowed, else minus infinity."""
        made = self._made.get((groups, dtype))
        if made is None:
            made = torch.zeros(self.allowed.shape, dtype=dtype, device=self.allowed.device)
            made = made.masked_fill_(~self.allowed, float("-inf")).repeat(groups, 1)[None, None]
            self._made[groups, dtype] = made
        return made

    @cached_property
    def blind(self) -> torch.Tensor | None:
        """[T], bool: query rows that see nothing of the segment; None if there are none."""
        blind = ~self.allowed.any(-1)
        return blind if bool(blind.any()) else None


@dataclass(frozen=True, slots=True)
class Group:
    """How the query reads the context group: the segments that were encoded without seeing each other.

    Such segments together draw more attention, and spread it wider, than one text encoded in sequence. With
    G the log-sum-exp of all visible scores of the group divided by the temperature, the group weighs
    exp(scale * temperature * G) against everything else; inside, it is a softmax of score / temperature.

    Attributes:
        temperature: divides the group's scores; below one sharpens.
        scale: exponent of the group's sum; one with a temperature of one is plain attention.

    Source: adaptive parallel encoding (Yang et al. 2025, arXiv:2502.05431).
    """

    temperature: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.temperature < inf and 0 < self.scale < inf):
            raise ValueError(
                f"a group needs a temperature and a scale above 0, not {self.temperature} and {self.scale}"
            )


@dataclass(frozen=True, slots=True)
class Rows:
    """One segment's keys and values, and who sees them.

    Attributes:
        keys: [B or 1, K, n, D], rotated at the positions that the `Turn` is relative to.
        values: [B or 1, K, n, Dv].
        first_row: query rows before this one do not see the segment.
        mask: for the query rows from `first_row` on; None: they see every row.
        causal: query row i sees columns 0..i; needs n == T, no `mask` and `first_row` 0.
        in_group: belongs to the context group; means nothing where no `Group` is given.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first_row: int = 0
    mask: RowMask | None = None
    causal: bool = False
    in_group: bool = False

    @property
    def is_open(self) -> bool:
        """Whether every query row sees every row."""
        return self.mask is None and not self.causal and self.first_row == 0


@dataclass(frozen=True, slots=True)
class Attended:
    """The output of attention over segments.

    Attributes:
        out: [B, H, T, Dv], dtype of the query.
        mass: [S, B, H, T], float32: the share of each query row's attention that each segment got
            (they sum to one together with the attention sinks' share, if there are any).
        lse: [B, H, T], float32: log of the sum of all exponentiated scores, attention sinks' included and
            the group's as it weighs; minus infinity for query rows that see nothing. None where it was not
            asked for and does not come by itself.
    """

    out: torch.Tensor
    mass: torch.Tensor
    lse: torch.Tensor | None = None

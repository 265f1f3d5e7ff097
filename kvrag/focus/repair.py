"""Which rows of documents are read again with everything before them visible, to mend independent encoding.

A document that was encoded on its own knows nothing of the others. Reading a few of its rows again, at their
places in the prompt, brings back part of what full attention would have known; reading all of them is full
attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from kvrag.compose import Arrangement
from kvrag.errors import ConfigError

Rows = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a repair may ask for before it chooses.

    Attributes:
        deviations: for a layer, how far the values of each document's rows change when they are read with
            everything before them: [n] float32 by document number. Costs reading all documents up to there.
        columns: attention of the question to each document's rows, for the layers the repair asked for:
            [n] float32 by document number. Empty before the question was read.
    """

    deviations: Callable[[int], Mapping[int, torch.Tensor]]
    columns: Mapping[int, Mapping[int, torch.Tensor]] = field(default_factory=dict)


class Repair(ABC):
    """Chooses rows to read again; by default without having read the question."""

    __slots__ = ()

    @property
    def needs_question(self) -> bool:
        """Whether the question has to be read before rows can be chosen; it is then read twice."""
        return False

    def column_layers(self, num_layers: int) -> frozenset[int]:
        """Layers whose attention to single rows is wanted from the first reading."""
        return frozenset()

    @property
    def by_last_row(self) -> bool:
        """Whether only the question's last row counts for that, the one that chooses the first token."""
        return False

    @abstractmethod
    def rows(self, arrangement: Arrangement, evidence: Evidence) -> Rows:
        """Rows to read again, by document number."""


@dataclass(frozen=True, slots=True)
class FirstRows(Repair):
    """The first rows of each document but the first (EPIC / LegoLink, arXiv:2410.15332).

    They take most of the attention that every independently encoded document grows at its beginning.

    Attributes:
        count: rows of each document.
    """

    count: int = 16

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        if self.count < 0:
            raise ConfigError(f"count={self.count}: expected 0 or more rows")

    def rows(self, arrangement: Arrangement, evidence: Evidence) -> Rows:
        """See `Repair`."""
        return {
            unit.number: tuple(range(min(self.count, unit.kv.num_tokens))) for unit in arrangement.units[1:]
        }


@dataclass(frozen=True, slots=True)
class Deviation(Repair):
    """The rows whose values change most when everything is read (CacheBlend, arXiv:2405.16444, sec. 4).

    All documents are read up to `layer`; D_j = sum of (new value - stored value)^2 over heads and dimensions
    chooses. Unlike CacheBlend, rows not chosen keep what is stored in these first layers too.

    Attributes:
        share: of all rows of documents that are read again.
        layer: whose values are compared; in layer 0 they do not depend on anything before.
    """

    share: float = 0.15
    layer: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible shares and layers."""
        _check_share(self.share)
        if self.layer < 1:
            raise ConfigError(f"layer={self.layer}: values of layer 0 never change; expected 1 or more")

    def rows(self, arrangement: Arrangement, evidence: Evidence) -> Rows:
        """See `Repair`."""
        if self.share == 1:
            return _all(arrangement)
        return _largest(evidence.deviations(self.layer), self.share)


@dataclass(frozen=True, slots=True)
class QueryDriven(Repair):
    """The rows that the question looks at most (FusionRAG, arXiv:2601.12904; ProphetKV, arXiv:2602.02579).

    Attributes:
        share: of all rows of the surviving documents that are read again.
        layers: whose attention chooses; None: the last layer's, as in FusionRAG.
        looked_by: "question": all its rows; "last": the row that chooses the first token.
    """

    share: float = 0.15
    layers: tuple[int, ...] | None = None
    looked_by: Literal["question", "last"] = "question"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_share(self.share)
        if self.looked_by not in ("question", "last"):
            raise ConfigError(f"looked_by={self.looked_by!r}: expected 'question' or 'last'")

    @property
    def needs_question(self) -> bool:
        """Its attention decides."""
        return True

    def column_layers(self, num_layers: int) -> frozenset[int]:
        """The layers that choose."""
        return frozenset((num_layers - 1,) if self.layers is None else self.layers)

    @property
    def by_last_row(self) -> bool:
        """As it was asked for."""
        return self.looked_by == "last"

    def rows(self, arrangement: Arrangement, evidence: Evidence) -> Rows:
        """See `Repair`."""
        numbers = [unit.number for unit in arrangement.units]
        layers = list(evidence.columns.values())
        return _largest({n: torch.stack([c[n] for c in layers]).sum(0) for n in numbers}, self.share)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"share={share}: expected 0 to 1")


def _all(arrangement: Arrangement) -> Rows:
    return {unit.number: tuple(range(unit.kv.num_tokens)) for unit in arrangement.units}


def _largest(values: Mapping[int, torch.Tensor], share: float) -> Rows:
    """The share of all rows with the largest values, by document."""
    if not values:
        return {}
    joined = torch.cat(list(values.values()))
    count = round(share * len(joined))
    chosen = torch.zeros(len(joined), dtype=torch.bool)
    chosen[joined.float().cpu().topk(count).indices] = True
    parts = chosen.split([len(v) for v in values.values()])
    return {number: tuple(part.nonzero()[:, 0].tolist()) for number, part in zip(values, parts, strict=True)}

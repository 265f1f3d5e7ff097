"""Reading a prompt's fresh tokens over a segment table.

What takes several passes is written as a generator that asks for them (`Work`), so that whoever runs it can
read for others in between or in the same pass; `alone` runs it at once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch

from kvrag.attention import Fixed, Looking, TableReading, Tables
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.segments import SegmentTable
from kvrag.worker import Ask

STRIDE = 2048
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Want(Ask):
    """Tokens that a request wants read over its own rows; see `read` for the attributes.

    The last tokens' logits are what comes back, with masses of all rows.

    Attributes:
        num_logits: of how many last tokens.
    """

    table: SegmentTable | Tables
    tokens: Sequence[int]
    positions: Sequence[int]
    fresh: FreshRows
    looking: Looking | None = None
    num_logits: int = 1

    def read(self, model: Model) -> Read:
        """Read them in a pass of their own."""
        return read(
            model,
            self.table,
            self.tokens,
            self.positions,
            self.fresh,
            looking=self.looking,
            logits_to_keep=self.num_logits,
        )


Work: TypeAlias = "Generator[Ask, Read, T]"


@torch.inference_mode()
def alone(model: Model, work: Work[T]) -> T:
    """Do work in one go, every pass on its own.

    Raises:
        Exception: what the work raises; it has come to its end then.
    """
    try:
        ask = next(work)
        while True:
            # An answer to a pause is not looked at.
            ask = work.send(ask.read(model) if isinstance(ask, Want) else _NOTHING)
    except StopIteration as end:
        done: T = end.value
        return done


@dataclass(frozen=True, slots=True)
class Read:
    """What reading fresh tokens gave.

    Attributes:
        logits: [kept, V], in the model's dtype.
        mass: [L, S, T], float32: attention mass of each segment per layer and fresh row, mean over heads.
        focus: [L, S, T], float32: the same for squared masses.
        columns: for layers asked for, the attention to each row of each segment, [n] float32 each.
    """

    logits: torch.Tensor
    mass: torch.Tensor
    focus: torch.Tensor
    columns: dict[int, list[torch.Tensor]]


_NOTHING = Read(torch.empty(0), torch.empty(0), torch.empty(0), {})


def read_prompt(
    model: Model,
    table: SegmentTable,
    tokens: Sequence[int],
    positions: Sequence[int],
    fresh: FreshRows,
    *,
    tables: Tables | None = None,
    looking: Looking | None = None,
    stride: int = STRIDE,
) -> Read:
    """Read a prompt's fresh tokens at once; see `reading_prompt`."""
    work = reading_prompt(table, tokens, positions, fresh, tables=tables, looking=looking, stride=stride)
    return alone(model, work)


def reading_prompt(
    table: SegmentTable,
    tokens: Sequence[int],
    positions: Sequence[int],
    fresh: FreshRows,
    *,
    tables: Tables | None = None,
    looking: Looking | None = None,
    stride: int = STRIDE,
) -> Work[Read]:
    """Read a prompt's fresh tokens in strides, so that memory does not grow with the square of the prompt.

    What depends on the attention of the question (pruning, columns) happens in the last stride.

    Args:
        table: what was read before; a segment's `first_row` counts rows of `tokens`.
        tokens: at least one, in prompt order.
        positions: of the tokens.
        fresh: empty; extended.
        tables: what each layer of the last stride reads, with the segments of `table`; None: `table`.
        looking: see there; its `from_row` counts rows of `tokens`.
        stride: most tokens per forward pass.

    Returns:
        The last token's logits, and mass and focus of all rows.
    """
    reads = []
    group = Looking(looking.group, from_row=stride) if looking else None  # no row of theirs counts
    last = (len(tokens) - 1) // stride * stride
    for start in range(0, last, stride):
        end = start + stride
        seen = table.seen_from(start)
        reads.append((yield Want(seen, tokens[start:end], positions[start:end], fresh, group)))
    if looking:
        looking = replace(looking, from_row=max(0, looking.from_row - last))
    late = table.seen_from(last) if tables is None else _Late(tables, last)
    reads.append((yield Want(late, tokens[last:], positions[last:], fresh, looking)))
    mass, focus = (
        torch.cat(parts, dim=-1) for parts in zip(*((r.mass, r.focus) for r in reads), strict=True)
    )
    return Read(reads[-1].logits, mass, focus, reads[-1].columns)


class _Late:
    """Tables as rows of a later stride see them."""

    def __init__(self, tables: Tables, row: int) -> None:
        self._tables, self._row = tables, row

    def at(self, layer: int) -> SegmentTable:
        return self._tables.at(layer).seen_from(self._row)

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        self._tables.note(layer, mass, focus)


@torch.inference_mode()
def read(
    model: Model,
    table: SegmentTable | Tables,
    tokens: Sequence[int],
    positions: Sequence[int],
    fresh: FreshRows,
    *,
    looking: Looking | None = None,
    logits_to_keep: int = 1,
) -> Read:
    """Read tokens over a segment table, layer by layer; their rows are added to `fresh`.

    Args:
        model: the decoder.
        table: what was read before and is not read again; one table, or one for each layer.
        tokens: at least one, in prompt order.
        positions: of the tokens.
        fresh: rows of this request so far; extended.
        looking: how documents are attended to, and what of it is wanted.
        logits_to_keep: how many last tokens' logits to return; 0 for all.
    """
    tables = Fixed(table) if isinstance(table, SegmentTable) else table
    reading = TableReading(model.specs, tables, fresh, positions, device=model.device, looking=looking)
    ids = torch.tensor([list(tokens)], dtype=torch.long, device=model.device)
    logits = model.run(ids, reading, logits_to_keep=logits_to_keep)
    return found_by(reading, logits[0], positions)


def found_by(reading: TableReading, logits: torch.Tensor, positions: Sequence[int]) -> Read:
    """What a pass gave; notes that its rows are there now.

    Args:
        reading: of this request in that pass.
        logits: [kept, V].
        positions: of the tokens that were read.
    """
    reading.fresh.positions.extend(positions)
    if reading.mass:
        mass, focus = torch.stack(reading.mass), torch.stack(reading.focus)
        return Read(logits, mass, focus, reading.columns)
    nothing = logits.new_zeros((len(reading.specs), 0, len(positions)), dtype=torch.float32)
    return Read(logits, nothing, nothing, {})


class _Enough(Exception):
    """The layers that were asked for have been read."""


@dataclass(slots=True)
class _First:
    """Tables for the first layers only, and what those looked at."""

    tables: Tables
    num_layers: int
    mass: list[torch.Tensor] = field(default_factory=list)
    focus: list[torch.Tensor] = field(default_factory=list)

    def at(self, layer: int) -> SegmentTable:
        if layer >= self.num_layers:
            raise _Enough
        return self.tables.at(layer)

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        self.mass.append(mass)
        self.focus.append(focus)
        self.tables.note(layer, mass, focus)


class _UpTo(FreshRows):
    """Rows of the layers up to one, which nobody attends in."""

    def __init__(self, num_layers: int, last: int) -> None:
        super().__init__(num_layers)
        self._last = last

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's rows are all that is wanted of it."""
        rows = super().append(layer, keys, values)
        if layer == self._last:
            raise _Enough
        return rows


@dataclass(frozen=True, slots=True)
class FirstLayers:
    """What reading tokens in the first layers gave.

    Attributes:
        fresh: rows of these layers.
        mass: [S, T], float32, for each layer, see `Read`; nothing where there are no segments.
        focus: the same for squared masses.
    """

    fresh: FreshRows
    mass: list[torch.Tensor]
    focus: list[torch.Tensor]


@torch.inference_mode()
def read_first(
    model: Model,
    tables: Tables,
    tokens: Sequence[int],
    positions: Sequence[int],
    *,
    num_layers: int,
    looking: Looking | None = None,
    rows_alone: bool = False,
) -> FirstLayers:
    """Read tokens in the first layers only; rows of deeper layers are not touched.

    Args:
        model: the decoder.
        tables: what each of these layers reads.
        tokens: at least one, in prompt order.
        positions: of the tokens.
        num_layers: how many, at least one.
        looking: see there.
        rows_alone: of the last of them only the rows are wanted, not what they look at.
    """
    first = _First(tables, num_layers)
    fresh = _UpTo(model.num_layers, num_layers - 1) if rows_alone else FreshRows(model.num_layers)
    with suppress(_Enough):
        read(model, first, tokens, positions, fresh, looking=looking)
    return FirstLayers(fresh, first.mass, first.focus)

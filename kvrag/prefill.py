"""Reading known tokens: texts behind a prefix, and a prompt's fresh tokens over a segment table.

What takes several passes is written as a generator that asks for them (`Work`), so that whoever runs it can
read for others in between or in the same pass; `alone` runs it at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch

from kvrag.attention import EncodeReading, Fixed, Looking, TableReading, Tables
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import KV, LayerKV, SegmentTable
from kvrag.worker import PAUSE, Ask

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


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group texts of similar length so that no padded batch exceeds the budget.

    Args:
        lengths: tokens of each text.
        token_budget: most tokens of a batch, padding included; a longer text is a batch of its own.

    Yields:
        Numbers of the texts of one batch; every number comes exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batch: list[int] = []
    for i in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that are read one behind the other, and the texts among them whose rows are wanted.

    Attributes:
        tokens: at least one.
        texts: first token of each text and the one behind its last.
    """

    tokens: tuple[int, ...]
    texts: tuple[tuple[int, int], ...]


def encode(
    model: Model, texts: Sequence[Sequence[int]], prefix: KV | None = None, *, token_budget: int = 2048
) -> list[KV]:
    """Read texts independently of each other, each right behind the prefix (CacheFocus, sec. 1).

    Args:
        model: the decoder.
        texts: tokens of each text, at least one each.
        prefix: rows of the shared prefix; None for none.
        token_budget: most tokens per forward pass, padding included; a longer text is read in strides.

    Returns:
        One KV per text, in order; the prefix's rows are not part of it.
    """
    runs = [Run(tuple(text), ((0, len(text)),)) for text in texts]
    return [kv for (kv,) in encode_runs(model, runs, prefix, token_budget=token_budget)]


def encode_runs(
    model: Model, runs: Sequence[Run], prefix: KV | None = None, *, token_budget: int = 2048
) -> list[list[KV]]:
    """Read runs at once; see `encoding_runs`."""
    return alone(model, encoding_runs(model, runs, prefix, token_budget=token_budget))


def encoding_runs(
    model: Model, runs: Sequence[Run], prefix: KV | None = None, *, token_budget: int = 2048
) -> Work[list[list[KV]]]:
    """Read runs independently of each other, each right behind the prefix and each token once.

    Rows of a text are those it has behind the prefix and the tokens of its run before it. Its keys are
    rotated at its own positions 0..n-1, so that it can appear anywhere, with or without what stood there.

    Args:
        model: the decoder.
        runs: what is to be read.
        prefix: rows of the shared prefix; None for none.
        token_budget: most tokens per forward pass, padding included; a longer run is read in strides.

    Returns:
        For each run, one KV per text of it.
    """
    found: dict[int, list[KV]] = {}
    for batch in batches([len(run.tokens) for run in runs], token_budget):
        some = [runs[i] for i in batch]
        is_long = len(some[0].tokens) > token_budget
        if is_long:
            rows = yield from _in_strides(model, some[0], prefix, token_budget)
        else:
            rows = _rows(model, some, prefix)
            yield PAUSE
        for place, i in enumerate(batch):
            found[i] = [_text(model.specs, rows, place, runs[i].tokens, *text) for text in runs[i].texts]
    return [found[i] for i in range(len(runs))]


_RawRows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys, not rotated, and values of each layer, [B, K, T, D] and [B, K, T, Dv]."""


def _rows(model: Model, runs: Sequence[Run], prefix: KV | None) -> _RawRows:
    """One forward pass over padded runs."""
    longest = max(len(run.tokens) for run in runs)
    ids = torch.zeros(len(runs), longest, dtype=torch.long, device=model.device)
    for i, run in enumerate(runs):
        ids[i, : len(run.tokens)] = torch.tensor(run.tokens)
    reading = EncodeReading(model.specs, prefix, longest, device=model.device)
    model.run(ids, reading)
    return reading.kept


def _in_strides(model: Model, run: Run, prefix: KV | None, stride: int) -> Work[_RawRows]:
    """The same for one run, so that memory does not grow with the square of it."""
    read: list[_RawRows] = []
    for start in range(0, len(run.tokens), stride):
        piece = Run(run.tokens[start : start + stride], ())
        read.append(_rows(model, [piece], prefix))
        prefix = _extended(model.specs, prefix, piece.tokens, read[-1])
        yield PAUSE
    return [
        (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2))
        for layer in zip(*read, strict=True)
    ]


def _extended(specs: Sequence[LayerSpec], prefix: KV | None, tokens: tuple[int, ...], rows: _RawRows) -> KV:
    """A longer prefix: the rows behind it, their keys rotated once, at the places they have there."""
    before = 0 if prefix is None else prefix.num_tokens
    behind = _keep(specs, rows, 0, slice(0, len(tokens)), before)
    if prefix is None:
        return KV(tokens, behind)
    layers = (
        LayerKV(torch.cat((old.keys, new.keys), dim=1), torch.cat((old.values, new.values), dim=1))
        for old, new in zip(prefix.layers, behind, strict=True)
    )
    return KV(prefix.tokens + tokens, tuple(layers))


def _text(
    specs: Sequence[LayerSpec], rows: _RawRows, i: int, tokens: tuple[int, ...], start: int, end: int
) -> KV:
    """One text's rows out of a padded batch."""
    return KV(tokens[start:end], _keep(specs, rows, i, slice(start, end), 0))


def _keep(
    specs: Sequence[LayerSpec], rows: _RawRows, i: int, part: slice, position: int
) -> tuple[LayerKV, ...]:
    """Rows of every layer in memory of their own, keys rotated at positions from `position` on."""
    device = rows[0][0].device
    places = torch.arange(position, position + part.stop - part.start, device=device)
    turns = {s: s.rotation.turn(places) if s.rotation else None for s in dict.fromkeys(specs)}
    return tuple(
        LayerKV(_own(rotate(keys[i : i + 1, :, part], turns[spec])), _own(values[i : i + 1, :, part]))
        for spec, (keys, values) in zip(specs, rows, strict=True)
    )


def _own(rows: torch.Tensor) -> torch.Tensor:
    """[K, n, D], contiguous, in memory of its own."""
    return rows[0].clone(memory_format=torch.contiguous_format)


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

"""A decode step over buffers that never move: captured once as a CUDA graph, then replayed.

A step of the ordinary way is several hundred launches, each of which Python prepares; on a GPU that takes
longer than the work. Here everything that changes from token to token (the token, its position, how many rows
there are) lies in memory of the device, where the kernels read it: one graph serves all tokens of an answer.

Without a GPU nothing can be captured; the same code runs as it stands then, with Triton's interpreter, which
is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvrag.attention import Looking, Tables
from kvrag.backbone import AttentionCall
from kvrag.errors import UnsupportedModel
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, Want
from kvrag.rotary import LayerSpec, Rotation, rotate
from kvrag.segments import Segment, SegmentTable
from kvrag_kernels import Group, RowMask, Rows, Turn, backend
from kvrag_kernels.segment_attention import is_supported

if TYPE_CHECKING:
    from kvrag_kernels.segment_attention.launch import StaticAttention

_ROOM = 512  # tokens that one graph serves before another is made
_BEFORE = 2  # tokens of an answer that are read the ordinary way: shorter ones are not worth a graph


def can_replay(
    table: SegmentTable | Tables,
    fresh: FreshRows,
    specs: Sequence[LayerSpec],
    looking: Looking | None,
    device: torch.device,
) -> bool:
    """Whether decode steps over a table can be replayed.

    Not those whose masks move with the position (windows), whose tables change from step to step, or of which
    the attention to single rows is wanted; and only where the Triton kernel runs.
    """
    return (
        backend(device) == "triton"
        and isinstance(table, SegmentTable)
        and fresh.borders is None
        and all(spec.window is None for spec in specs)
        and all(segment.first_row == 0 and not segment.standing for segment in table)
        and (looking is None or not looking.column_layers)
    )


class _Angles:
    """The turns of one kind of layer to one set of segments, made from a position that lies on the device."""

    def __init__(self, rotation: Rotation, targets: Sequence[int], device: torch.device) -> None:
        frequencies = torch.tensor(rotation.frequencies, dtype=torch.float32, device=device)
        self._frequencies = frequencies.double() * rotation.sign
        self._targets = torch.tensor([*targets, 0], device=device)[:, None, None]
        shape = (len(targets) + 1, 1, len(rotation.frequencies))
        cos, sin = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.turn = Turn(cos, sin, rotation.start, rotation.layout == "interleaved")
        self.own = replace(self.turn, cos=cos[-1:], sin=sin[-1:])

    def renew(self, position: torch.Tensor) -> None:
        """As for a row at `position` [1]; see `Rotation.turn`."""
        angles = (position - self._targets).double() * self._frequencies
        self.turn.cos.copy_(angles.cos())
        self.turn.sin.copy_(angles.sin())


@dataclass(frozen=True, slots=True)
class _Kind:
    """What layers of one rotation that read the same segments have in common.

    Attributes:
        read: numbers of the segments, on the device.
        segments: themselves.
        angles: None in layers without positions.
    """

    read: torch.Tensor
    segments: tuple[Segment, ...]
    angles: _Angles | None


class _Unreadable(Exception):
    """The kernel cannot read a layer's rows as they lie."""


class StaticReading:
    """Reads one token after the other over the same segments (see `kvrag.backbone.Reading`).

    Attributes:
        position: [1], int64, of the token.
        at: [1], int64, the fresh row that it becomes.
        mass: [L, S], float32, see `kvrag.attention.TableReading`.
        focus: [L, S], float32.
    """

    def __init__(self, model: Model, table: SegmentTable, fresh: FreshRows, group: Group | None) -> None:
        """Read over `table` and the rows that `fresh` holds."""
        device = model.device
        self.position, self.at = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        shape = (model.num_layers, len(table))
        self.mass, self.focus = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        self._specs, self._fresh, self._group = model.specs, fresh, group
        self._attentions: dict[int, StaticAttention] = {}
        self._lengths: dict[int, torch.Tensor] = {}  # one for all layers of a kind
        made: dict[tuple[LayerSpec, tuple[int, ...]], _Kind] = {}
        self._kinds: list[_Kind] = []
        for layer, spec in enumerate(model.specs):
            read = tuple(i for i, s in enumerate(table) if s.is_read_by(layer))
            if (spec, read) not in made:
                made[spec, read] = _kind(spec, table, read, device)
            self._kinds.append(made[spec, read])
        self._distinct = list(made.values())

    def begin(self) -> None:
        """Take `position` and `at` as they are now."""
        for kind in self._distinct:
            if kind.angles is not None:
                kind.angles.renew(self.position)
        for lengths in self._lengths.values():
            lengths[:, -1] = self.at + 1

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Rotate and keep the fresh key, then attend to segments and fresh rows where they lie."""
        kind, (keys, values) = self._kinds[layer], self._fresh.held(layer)
        key = rotate(call.key, kind.angles.own if kind.angles is not None else None)
        keys.index_copy_(2, self.at, key)
        values.index_copy_(2, self.at, call.value)
        if layer not in self._attentions:
            self._attentions[layer] = self._attention(layer, call, Rows(keys, values))
        attended = self._attentions[layer](call.query)
        share = attended.mass[:-1, 0, :, 0]
        self.mass[layer].index_copy_(0, kind.read, share.mean(1))
        self.focus[layer].index_copy_(0, kind.read, share.square().mean(1))
        return attended.out

    def _attention(self, layer: int, call: AttentionCall, fresh: Rows) -> StaticAttention:
        from kvrag_kernels.segment_attention.launch import StaticAttention  # noqa: PLC0415 - triton is an extra

        kind = self._kinds[layer]
        rows = [*(_rows(segment, layer) for segment in kind.segments), fresh]
        turn = kind.angles.turn if kind.angles is not None else None
        if not is_supported(call.query, [rows], turn):
            raise _Unreadable
        made = StaticAttention(
            call.query,
            [rows],
            [turn],
            scale=call.scale * self._specs[layer].score_factor(call.query.dtype),
            softcap=call.softcap,
            sinks=call.sinks,
            group=self._group,
        )
        if id(kind) not in self._lengths:
            self._lengths[id(kind)] = made.lengths
            made.lengths[:, -1] = self.at + 1
        made.lengths = self._lengths[id(kind)]
        return made

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: a single row sees everything."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        if mask is not None:
            raise UnsupportedModel(f"layer {layer} got an attention mask that kvrag did not make")


def _kind(spec: LayerSpec, table: SegmentTable, read: tuple[int, ...], device: torch.device) -> _Kind:
    segments = tuple(table.segments[i] for i in read)
    targets = [segment.target for segment in segments]
    angles = _Angles(spec.rotation, targets, device) if spec.rotation is not None else None
    return _Kind(torch.tensor(read, dtype=torch.int64, device=device), segments, angles)


def _rows(segment: Segment, layer: int) -> Rows:
    """One segment's rows in one layer, nothing copied; rows that fresh ones stand for are hidden."""
    kv, mask = segment.kv.layers[layer], None
    if segment.hidden:
        allowed = torch.ones(1, kv.num_tokens, dtype=torch.bool)
        allowed[:, list(segment.hidden)] = False
        mask = RowMask(allowed.to(kv.keys.device))
    return Rows(kv.keys[None], kv.values[None], mask=mask, in_group=segment.document is not None)


class DecodeStep:
    """Reads one token at a time as `Want.read` does; without Python's part of it once it is captured."""

    def __init__(
        self, model: Model, table: SegmentTable, fresh: FreshRows, group: Group | None = None
    ) -> None:
        """Make room for tokens behind those that `fresh` has, which are at least one.

        Args:
            model: the decoder.
            table: what every token reads.
            fresh: rows of the prompt and of the answer so far; extended, and possible to extend otherwise.
            group: how documents are attended to; None for the plain way.
        """
        self._model, self.fresh = model, fresh
        fresh.hold(_ROOM)
        self._held = fresh.held(0)
        self._ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        self._reading = StaticReading(model, table, fresh, group)
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_refused = False

    @property
    def is_captured(self) -> bool:
        """Whether the next token is read by replaying a graph."""
        return self._graph is not None

    @property
    def is_usable(self) -> bool:
        """Whether there is room for one more row where the graph writes it."""
        keys, _ = self.fresh.held(0)
        return keys is self._held[0] and self.fresh.num_rows < keys.shape[2]

    def read(self, token: int, position: int) -> Read:
        """Read a token at a position behind all that was read before."""
        self._ids.fill_(token)
        self._reading.position.fill_(position)
        self._reading.at.fill_(self.fresh.num_rows)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()  # compiles what is to be captured
            if self._model.device.type == "cuda" and not self._is_refused:
                self._capture()
        self.fresh.took(position)
        assert self._logits is not None
        mass, focus = (x[..., None].clone() for x in (self._reading.mass, self._reading.focus))
        return Read(self._logits.clone(), mass, focus, {})

    def _run(self) -> None:
        self._reading.begin()
        logits = self._model.run(self._ids, self._reading)[0]
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)

    def _capture(self) -> None:
        """Record the launches of a step, whose buffers exist by now; nothing is computed.

        A model whose code waits for the device in between cannot be recorded; it goes on as it is.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._model.device), torch.cuda.graph(graph):
                self._run()
        except RuntimeError:
            self._is_refused = True
            return
        self._graph = graph


class Replays:
    """The decode steps of one answer: the first ones the ordinary way, then replayed."""

    def __init__(self) -> None:
        """Begin an answer, or go on with one over another table."""
        self._step: DecodeStep | None = None
        self._num_read = 0
        self._is_refused = False

    @torch.inference_mode()
    def read(self, model: Model, want: Want) -> Read | None:
        """Read what is wanted, one token; None where the ordinary way is to do it."""
        assert isinstance(want.table, SegmentTable)
        self._num_read += 1
        if self._num_read <= _BEFORE or self._is_refused:
            return None
        if self._step is None or not self._step.is_usable:
            group = want.looking.group if want.looking is not None else None
            self._step = DecodeStep(model, want.table, want.fresh, group)
        try:
            return self._step.read(want.tokens[0], want.positions[0])
        except _Unreadable:  # before anything was counted
            self._is_refused, self._step = True, None
            return None


@dataclass(frozen=True, slots=True)
class ReplayedWant(Want):
    """One token that is read by replaying a step, unless it is read together with other requests' tokens."""

    replays: Replays | None = None

    def read(self, model: Model) -> Read:
        """Read it in a pass of its own."""
        found = self.replays.read(model, self) if self.replays is not None else None
        return Want.read(self, model) if found is None else found

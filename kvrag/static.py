"""Attention of one token each of some requests, over buffers that never move.

Everything that changes from token to token (the tokens' positions, how many rows there are) lies in memory of
the device, where the kernels read it; so a whole pass can be recorded once and repeated (see `kvrag.replay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvrag.backbone import AttentionCall
from kvrag.errors import UnsupportedModel
from kvrag.model import Model
from kvrag.rotary import LayerSpec, Rotation, rotate
from kvrag.segments import Segment, SegmentTable
from kvrag_kernels import Group, RowMask, Rows, Turn
from kvrag_kernels.segment_attention import is_supported

if TYPE_CHECKING:
    from kvrag_kernels.segment_attention.launch import StaticAttention


class Unreadable(Exception):
    """The kernel cannot read a layer's rows as they lie."""


class _Angles:
    """The turns of one kind of layer to the requests' segments, from positions that lie on the device.

    Attributes:
        cos: [B, S, 1, R], float32: of each request's segments, and behind them of its fresh rows.
        sin: the same.
        own: turn of the fresh rows as if the requests were rows of one, [1, B, R].
    """

    def __init__(
        self, rotation: Rotation, targets: Sequence[Sequence[int]], num_places: int, device: torch.device
    ) -> None:
        frequencies = torch.tensor(rotation.frequencies, dtype=torch.float32, device=device)
        self._frequencies = frequencies.double() * rotation.sign
        self._rotation, self._counts = rotation, [len(own) + 1 for own in targets]
        rows = [[*own, *[0] * (num_places - len(own))] for own in targets]
        self._targets = torch.tensor(rows, device=device)[..., None, None]
        shape = (len(targets), num_places, 1, len(rotation.frequencies))
        self.cos, self.sin = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.own = self._turn(self.cos.new_empty((1, *shape[::3])), self.cos.new_empty((1, *shape[::3])))

    def _turn(self, cos: torch.Tensor, sin: torch.Tensor) -> Turn:
        return Turn(cos, sin, self._rotation.start, self._rotation.layout == "interleaved")

    def turns(self) -> list[Turn]:
        """Of each request."""
        pairs = zip(self.cos, self.sin, self._counts, strict=True)
        return [self._turn(cos[:count], sin[:count]) for cos, sin, count in pairs]

    def renew(self, positions: torch.Tensor) -> None:
        """As for rows at `positions` [B]; see `Rotation.turn`."""
        angles = (positions[:, None, None, None] - self._targets).double() * self._frequencies
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        own = positions[None, :, None].double() * self._frequencies
        self.own.cos.copy_(own.cos())
        self.own.sin.copy_(own.sin())


@dataclass(frozen=True, slots=True)
class _Kind:
    """What layers of one rotation that read the same segments have in common.

    Attributes:
        read: [B, S], numbers of each request's segments in its table, on the device; where it has fewer, that
            of a place behind all of them.
        segments: themselves, by request.
        angles: None in layers without positions.
    """

    read: torch.Tensor
    segments: tuple[tuple[Segment, ...], ...]
    angles: _Angles | None

    @staticmethod
    def of(
        spec: LayerSpec,
        tables: Sequence[SegmentTable],
        read: Sequence[Sequence[int]],
        device: torch.device,
    ) -> _Kind:
        """Of the layers that read these numbers of each request's segments."""
        segments = [tuple(table.segments[i] for i in own) for table, own in zip(tables, read, strict=True)]
        num_places, nowhere = max(map(len, read)) + 1, max(map(len, tables))
        places = [[*own, *[nowhere] * (num_places - len(own))] for own in read]
        targets = [[segment.target for segment in own] for own in segments]
        angles = None
        if spec.rotation is not None:
            angles = _Angles(spec.rotation, targets, num_places, device)
        return _Kind(torch.tensor(places, dtype=torch.int64, device=device), tuple(segments), angles)


class StaticReading:
    """Reads one token of each request after the other over the same segments (see `kvrag.backbone.Reading`).

    Attributes:
        positions: [B], int64, of the tokens.
        at: [B], int64, the fresh rows that they become.
        mass: [L, B, S + 1], float32, see `kvrag.attention.TableReading`; the last place means nothing.
        focus: the same.
    """

    def __init__(
        self,
        model: Model,
        tables: Sequence[SegmentTable],
        held: Sequence[tuple[torch.Tensor, torch.Tensor]],
        places: tuple[torch.Tensor, torch.Tensor],
        group: Group | None,
    ) -> None:
        """Read over each request's table and its fresh rows.

        Args:
            model: the decoder.
            tables: of the requests.
            held: per layer, buffers of all requests' fresh keys and values, [B, K, room, D].
            places: `positions` and `at`, on the model's device; looked at anew by every pass.
            group: how documents are attended to; None for the plain way.
        """
        device, num = model.device, len(tables)
        self.positions, self.at = places
        self._numbers = torch.arange(num, device=device)
        shape = (model.num_layers, num, max(map(len, tables)) + 1)
        self.mass, self.focus = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        self._specs, self._held, self._group = model.specs, held, group
        self._attentions: dict[int, StaticAttention] = {}
        # Of all layers of a kind: lengths, and where among them each request's fresh rows are.
        self._lengths: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        made: dict[tuple[LayerSpec, tuple[tuple[int, ...], ...]], _Kind] = {}
        self._kinds: list[_Kind] = []
        for layer, spec in enumerate(model.specs):
            read = tuple(tuple(i for i, s in enumerate(t) if s.is_read_by(layer)) for t in tables)
            if (spec, read) not in made:
                made[spec, read] = _Kind.of(spec, tables, read, device)
            self._kinds.append(made[spec, read])
        self._distinct = list(made.values())

    def begin(self) -> None:
        """Take `positions` and `at` as they are now."""
        for kind in self._distinct:
            if kind.angles is not None:
                kind.angles.renew(self.positions)
        for lengths, places in self._lengths.values():
            self._renew(lengths, places)

    def _renew(self, lengths: torch.Tensor, places: torch.Tensor) -> None:
        lengths[self._numbers, places] = (self.at + 1).to(lengths.dtype)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Rotate and keep the fresh keys, then attend to segments and fresh rows where they lie."""
        kind, (keys, values) = self._kinds[layer], self._held[layer]
        own = kind.angles.own if kind.angles is not None else None
        keys[self._numbers, :, self.at] = rotate(call.key.transpose(0, 2), own)[0].transpose(0, 1)
        values[self._numbers, :, self.at] = call.value[:, :, 0]
        if layer not in self._attentions:
            self._attentions[layer] = self._attention(layer, call)
        attended = self._attentions[layer](call.query)
        share = attended.mass[..., 0].transpose(0, 1)  # [B, S, H]
        self.mass[layer].scatter_(1, kind.read, share.mean(2))
        self.focus[layer].scatter_(1, kind.read, share.square().mean(2))
        return attended.out

    def _attention(self, layer: int, call: AttentionCall) -> StaticAttention:
        from kvrag_kernels.segment_attention.launch import StaticAttention  # noqa: PLC0415 - triton is an extra

        kind = self._kinds[layer]
        fresh = [Rows(k[None], v[None]) for k, v in zip(*self._held[layer], strict=True)]
        rows = [
            [*(_rows(segment, layer) for segment in own), last]
            for own, last in zip(kind.segments, fresh, strict=True)
        ]
        turns = kind.angles.turns() if kind.angles is not None else [None] * len(rows)
        if not is_supported(call.query, rows, turns[0]):
            raise Unreadable
        made = StaticAttention(
            call.query,
            rows,
            turns,
            scale=call.scale * self._specs[layer].score_factor(call.query.dtype),
            softcap=call.softcap,
            sinks=call.sinks,
            group=self._group,
        )
        if kind.angles is not None:
            made.cos, made.sin = kind.angles.cos, kind.angles.sin
        if id(kind) not in self._lengths:
            order = zip(made.table.order, kind.segments, strict=True)
            places = torch.tensor([places.index(len(own)) for places, own in order], device=self.at.device)
            self._lengths[id(kind)] = made.lengths, places
            self._renew(made.lengths, places)
        made.lengths, _ = self._lengths[id(kind)]
        return made

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: a single row sees everything."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        if mask is not None:
            raise UnsupportedModel(f"layer {layer} got an attention mask that kvrag did not make")


def _rows(segment: Segment, layer: int) -> Rows:
    """One segment's rows in one layer, nothing copied; rows that fresh ones stand for are hidden."""
    kv, mask = segment.kv.layers[layer], None
    if segment.hidden:
        allowed = torch.ones(1, kv.num_tokens, dtype=torch.bool)
        allowed[:, list(segment.hidden)] = False
        mask = RowMask(allowed.to(kv.keys.device))
    return Rows(kv.keys[None], kv.values[None], mask=mask, in_group=segment.document is not None)

"""One forward pass for several requests: weights are read once, attention is each request's own.

The tokens of all of them stand in one row. Only attention lets tokens see each other, and it is cut up by
request: everybody's tokens go to his own `TableReading`, with his own segments, fresh rows and positions. On
a GPU, requests that each read equally many tokens (one, while answers are written) attend in one launch; on a
CPU, answers over copied rows are written side by side (`kvrag.abreast`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from kvrag.abreast import Abreast, is_abreast
from kvrag.attention import Fixed, Prepared, TableReading, refuse_mask
from kvrag.backbone import AttentionCall
from kvrag.model import Model
from kvrag.prefill import Read, Want, found_by
from kvrag.replay import SharedReplays
from kvrag.segments import SegmentTable
from kvrag_kernels import Attended, Group, backend, segment_attention_many

logger = logging.getLogger(__name__)

Outcome = Read | Exception

_MOST_ROWS = 256  # tokens of a request up to which it shares a launch: longer ones fill the device alone

_Kind = tuple[int, Group | None]


@dataclass(frozen=True, slots=True)
class _Share:
    """What of a pass is one request's own.

    Attributes:
        want: what it wants read.
        rows: which of the pass's tokens.
        num_before: fresh rows that it had before.
    """

    want: Want
    rows: slice
    num_before: int

    @staticmethod
    def of(wants: Sequence[Want]) -> list[_Share]:
        """One behind the other."""
        ends = accumulate(len(want.tokens) for want in wants)
        return [
            _Share(want, slice(end - len(want.tokens), end), want.fresh.num_rows)
            for want, end in zip(wants, ends, strict=True)
        ]


class _Part:
    """One request's attention in a pass.

    Attributes:
        rows: which of the pass's tokens are its own.
        reading: its attention.
        prepared: what the layer at hand attends to.
        error: what went wrong in it; the others go on.
    """

    def __init__(self, model: Model, share: _Share) -> None:
        want, self.rows = share.want, share.rows
        self.positions = want.positions
        tables = Fixed(want.table) if isinstance(want.table, SegmentTable) else want.table
        self.reading = TableReading(
            model.specs, tables, want.fresh, want.positions, device=model.device, looking=want.looking
        )
        self.prepared: Prepared | None = None
        self.error: Exception | None = None

    def prepare(self, layer: int, call: AttentionCall) -> None:
        """Take the own tokens of a call."""
        self.prepared = None
        if self.error is not None:
            return
        query, key, value = (x[:, :, self.rows] for x in (call.query, call.key, call.value))
        try:
            self.prepared = self.reading.prepare(layer, replace(call, query=query, key=key, value=value))
        except Exception as error:
            self.error = error

    @property
    def kind(self) -> _Kind | None:
        """What requests have in common that can share a launch; None: this one cannot."""
        looking, num_rows = self.reading.looking, self.rows.stop - self.rows.start
        if self.prepared is None or self.reading.fresh.parts is not None or num_rows > _MOST_ROWS:
            return None
        if looking.column_layers or any(rows.mask is not None for rows in self.prepared.rows):
            return None  # looked at closely anyway; masks would be asked for in everybody's rows
        return num_rows, looking.group

    def finish(self, layer: int, call: AttentionCall, attended: Attended | None) -> torch.Tensor:
        """Attention of the own tokens, [1, H, T, Dv], alone if it is not there yet; zeros behind an error."""
        prepared = self.prepared
        if prepared is not None:
            try:
                if attended is None and self.reading.fresh.parts is None:
                    attended = self.reading.alone(prepared)
                return self.reading.finish(layer, prepared, attended)
            except Exception as error:
                self.error = error
        query = call.query[:, :, self.rows]
        return query.new_zeros((*query.shape[:3], call.value.shape[-1]))


class SharedReading:
    """Attention of a pass whose tokens belong to several requests (see `kvrag.backbone.Reading`).

    Where the Triton kernel runs, requests with equally many tokens attend in one launch.
    """

    def __init__(self, parts: Sequence[_Part], abreast: Abreast | None = None) -> None:
        """Read for these, and for those whose answers are written side by side."""
        self._parts, self._abreast = parts, abreast

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Everybody's own."""
        if self._abreast is not None and not self._parts:
            return self._abreast.attend(layer, call)
        for part in self._parts:
            part.prepare(layer, call)
        found = self._together(call) if backend(call.query.device) == "triton" else {}
        query = call.query
        out = query.new_empty((*query.shape[:3], call.value.shape[-1]))
        for i, part in enumerate(self._parts):
            out[:, :, part.rows] = part.finish(layer, call, found.get(i))
        if self._abreast is not None:
            places = self._abreast.places
            query, key, value = (x[:, :, places] for x in (call.query, call.key, call.value))
            own = replace(call, query=query, key=key, value=value)
            out[:, :, places] = self._abreast.attend(layer, own)
        return out

    def _together(self, call: AttentionCall) -> dict[int, Attended]:
        """Launches for those that can share one, by number of the part."""
        kinds: dict[_Kind, list[int]] = {}
        for i, part in enumerate(self._parts):
            if (kind := part.kind) is not None:
                kinds.setdefault(kind, []).append(i)
        found: dict[int, Attended] = {}
        for same in kinds.values():
            if len(same) > 1:
                attended = self._launch([self._parts[i] for i in same], call)
                found.update(zip(same, attended, strict=False))  # none of them where the launch failed
        return found

    def _launch(self, parts: Sequence[_Part], call: AttentionCall) -> list[Attended]:
        """Several requests in one launch; nothing if it fails, and then each finds out for itself."""
        prepared = [part.prepared for part in parts if part.prepared is not None]
        try:
            return segment_attention_many(
                torch.cat([x.call.query for x in prepared]),
                [x.rows for x in prepared],
                [x.layout.turn for x in prepared],
                scale=prepared[0].scale,
                softcap=call.softcap,
                sinks=call.sinks,
                group=parts[0].reading.looking.group,
                with_lse=any(part.reading.looking.watch is not None for part in parts),
            )
        except Exception:
            return []

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: who sees what is decided in the parts."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        refuse_mask(layer, mask)


class Passes:
    """Chooses what is read next, and reads it in one pass."""

    def __init__(self, model: Model, num_tokens: int) -> None:
        """Read for the callers of one model.

        Args:
            model: the decoder.
            num_tokens: most tokens of a pass, beside those of answers being written.
        """
        self._model, self._num_tokens = model, num_tokens
        self._replays = SharedReplays()

    def choose(self, wants: Sequence[Want]) -> list[int]:
        """Numbers of those that the next pass reads: all single tokens, and of longer ones what fits.

        Args:
            wants: those that have waited longest first; of the longer ones, the first always has its turn.
        """
        chosen, taken = [], 0
        for i, want in enumerate(wants):
            size = len(want.tokens)
            if size == 1:
                chosen.append(i)
            elif not taken or taken + size <= self._num_tokens:
                chosen.append(i)
                taken += size
        return chosen

    @torch.inference_mode()
    def run(self, wants: Sequence[Want]) -> list[Outcome]:
        """Read; what goes wrong for one of them is its own outcome."""
        if len(wants) > 1 and (found := self._replayed(wants)) is not None:
            return found
        if len(wants) == 1 and not is_abreast(self._model, wants[0]):
            return [self._alone(wants[0])]
        shares = _Share.of(wants)
        try:
            return self._together(shares)
        except Exception as error:  # of the pass itself, such as too little memory
            logger.warning("a pass of %d requests failed, each is read alone: %r", len(shares), error)
            return [self._again(share, error) for share in shares]

    def _replayed(self, wants: Sequence[Want]) -> list[Outcome] | None:
        """By repeating a recorded step, if all that is due is such a token of each; None: the other way."""
        try:
            found = self._replays.read(self._model, wants)
        except Exception:  # nothing was counted: the ordinary way finds out whose fault it is
            self._replays = SharedReplays()
            return None
        return None if found is None else [*found]

    def _together(self, shares: Sequence[_Share]) -> list[Outcome]:
        device = self._model.device
        ids = torch.tensor([[t for share in shares for t in share.want.tokens]], device=device)
        counts = [min(share.want.num_logits, len(share.want.tokens)) for share in shares]
        kept = [torch.arange(s.rows.stop - n, s.rows.stop) for s, n in zip(shares, counts, strict=True)]
        side = [i for i, share in enumerate(shares) if is_abreast(self._model, share.want)]
        parts = {i: _Part(self._model, share) for i, share in enumerate(shares) if i not in side}
        abreast = None
        if side:
            side_by_side = [shares[i] for i in side]
            abreast = Abreast(
                self._model, [s.want for s in side_by_side], [s.rows.start for s in side_by_side]
            )
        reading = SharedReading(list(parts.values()), abreast)
        logits = self._model.run(ids, reading, rows=torch.cat(kept).to(device))[0].split(counts)
        found: list[Outcome] = []
        for i, own in enumerate(logits):
            if abreast is not None and i not in parts:
                found.append(abreast.found(side.index(i), own))
            else:
                found.append(parts[i].error or found_by(parts[i].reading, own, parts[i].positions))
        return found

    def _again(self, share: _Share, error: Exception) -> Outcome:
        """A pass of its own, if nothing but the fresh rows has changed."""
        if not isinstance(share.want.table, SegmentTable):
            return error
        share.want.fresh.cut(share.num_before)
        return self._alone(share.want)

    def _alone(self, want: Want) -> Outcome:
        try:
            return want.read(self._model)
        except Exception as error:
            return error

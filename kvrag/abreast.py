"""Answers that are written side by side, each over rows that were copied into one run.

Where no kernel takes them all in one launch (on a CPU), what hangs on the position alone is done for all of
them at once; left to each is to keep its row and to attend to its own run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag.backbone import AttentionCall
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, Want
from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import SegmentTable
from kvrag_kernels import Attended, Rows, Turn, parted_attention


def is_abreast(model: Model, want: Want) -> bool:
    """Whether it is one token over a single run of rows, all of which every layer sees."""
    return (
        len(want.tokens) == 1
        and want.fresh.parts is not None
        and want.looking is None
        and isinstance(want.table, SegmentTable)
        and not len(want.table)
        and all(spec.window is None for spec in model.specs)
    )


class Abreast:
    """Attention of one token of each of several answers in one pass."""

    def __init__(self, model: Model, wants: Sequence[Want], places: Sequence[int]) -> None:
        """Read for these.

        Args:
            model: the decoder.
            wants: for which `is_abreast` holds.
            places: of their tokens in the pass.
        """
        self._specs, self._wants = model.specs, wants
        self.places = torch.tensor(places, device=model.device)
        self._positions = torch.tensor([[want.positions[0] for want in wants]], device=model.device)
        self._turns: dict[LayerSpec, Turn | None] = {}
        self._masses: list[list[torch.Tensor]] = [[] for _ in wants]
        self._errors: dict[int, Exception] = {}

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """What their tokens attended to.

        Args:
            layer: number of the layer.
            call: of their tokens alone, in their order.

        Returns:
            [1, H, n, Dv], zeros behind an error.
        """
        spec = self._specs[layer]
        if spec not in self._turns:
            self._turns[spec] = spec.rotation.turn(self._positions) if spec.rotation else None
        num_heads = call.query.shape[1]
        rotated = rotate(torch.cat((call.query, call.key), 1), self._turns[spec])
        query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        scale = call.scale * spec.score_factor(call.query.dtype)
        if query.dtype == torch.float32:  # once for all, where it costs no precision
            query, scale = query * scale, 1.0
        own = zip(*(_apart(x) for x in (query, key, call.value)), strict=True)
        out = query.new_zeros((len(self._wants), num_heads, call.value.shape[-1]))
        for i, (want, rows) in enumerate(zip(self._wants, own, strict=True)):
            if i not in self._errors:
                try:
                    attended = _attended(layer, want.fresh, rows, scale, call)
                except Exception as error:
                    self._errors[i] = error
                    continue
                out[i] = attended.out[0, :, 0]
                self._masses[i].append(attended.mass[:, 0])
        return out.transpose(0, 1)[None]

    def found(self, i: int, logits: torch.Tensor) -> Read | Exception:
        """What a pass gave one of them; notes that its row is there now.

        Args:
            i: which.
            logits: [1, V].
        """
        if i in self._errors:
            return self._errors[i]
        want, mass = self._wants[i], torch.stack(self._masses[i])  # [L, P, H, 1]
        want.fresh.positions.extend(want.positions)
        return Read(logits, mass.mean(2), mass.square().mean(2), {})


def _apart(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[1, H, 1, D] each: the rows of [1, H, n, D], which lie in one piece, as products want them."""
    return x[0].transpose(0, 1).contiguous()[:, None, :, None].unbind(0)


def _attended(
    layer: int, fresh: FreshRows, own: tuple[torch.Tensor, ...], scale: float, call: AttentionCall
) -> Attended:
    """Keep one answer's row, and attend to its run."""
    query, key, value = own
    if fresh.parts is None:
        raise ValueError("the rows were not copied together")
    rows = Rows(*fresh.append(layer, key, value))
    return parted_attention(
        query, rows, None, fresh.parts, scale=scale, softcap=call.softcap, sinks=call.sinks
    )

"""Attention to one run of rows that was copied together from several segments, with a mass for each part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F

from kvrag_kernels.segment_attention.reference import turn_query, visible
from kvrag_kernels.segment_attention.types import Attended, Rows, Turn


class Parts:
    """Where the parts of a run of columns end, and sums over each of them.

    Attributes:
        ends: [P], int64, column behind each part, in order; the last part may end before the run does.
    """

    def __init__(self, ends: Sequence[int], *, device: torch.device) -> None:
        """Parts may be empty."""
        self.ends = torch.tensor(list(ends), dtype=torch.int64, device=device)
        self._starts: numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]] | None = None
        starts = [0, *ends[:-1]]
        # Of an empty part NumPy would return the element behind it.
        if device.type == "cpu" and ends and all(a < b for a, b in zip(starts, ends, strict=True)):
            self._starts, self._end = numpy.array(starts), ends[-1]

    def __len__(self) -> int:
        """P."""
        return len(self.ends)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over each part.

        On a CPU NumPy adds every part up by itself, three to five times as fast as sums of all before.

        Args:
            x: [..., n], float32; gradients do not pass.

        Returns:
            [..., P], float32.
        """
        if self._starts is None:
            return self.sums_reference(x)
        return torch.from_numpy(
            numpy.add.reduceat(x.detach().numpy()[..., : self._end], self._starts, axis=-1)
        )

    def sums_reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same as differences of sums of all before; defines it."""
        sums = F.pad(x.cumsum(dim=-1), (1, 0)).index_select(-1, self.ends)
        return torch.cat((sums[..., :1], sums[..., 1:] - sums[..., :-1]), dim=-1)


def parted_attention(
    query: torch.Tensor,
    rows: Rows,
    turn: Turn | None,
    parts: Parts,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Attended:
    """Attend to one run by explicit scores; for the few query rows of a decode step.

    Args:
        query: [B, H, T, D], not rotated.
        rows: the run; query heads that share a key head are packed, so nothing is expanded.
        turn: with S = 1, or None.
        parts: of the run.
        scale: factor on the scores.
        softcap: soft cap of the scores.
        sinks: [H], extra scores.

    Returns:
        Output [B, H, T, Dv] and the mass of each part, [P, B, H, T].
    """
    batch, heads, num_rows, dim = query.shape
    kv_heads, columns = rows.keys.shape[1], rows.keys.shape[2]
    packed = turn_query(query, turn, 1)[0].reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(packed, rows.keys.transpose(-1, -2)).float()
    if scale != 1:
        scores = scores.mul_(scale)
    scores = scores.view(batch, heads, num_rows, columns)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if rows.mask is not None or rows.causal or rows.first_row:
        scores = scores.masked_fill(~visible(rows, num_rows), float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, num_rows, 1)
        scores = torch.cat((scores, sink), dim=-1)
    probs = scores.softmax(dim=-1)[..., :columns]
    out = torch.matmul(probs.to(rows.values.dtype).reshape(batch, kv_heads, -1, columns), rows.values)
    return Attended(out.view(batch, heads, num_rows, -1), parts.sums(probs).movedim(-1, 0))

"""Rotations as the model applies them, and tables of angles for any position or difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvrag_kernels import Turn
from kvrag_kernels.segment_attention.reference import turn_query

Layout = Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one kind of layer rotates queries and keys (RoPE, Su et al. 2021, arXiv:2104.09864).

    Attributes:
        frequencies: radians per position of each rotated pair, as the model's own float32 values.
        layout: pairs are (i, i + R) ("half") or (2i, 2i + 1) ("interleaved").
        start: first rotated dimension of the head.
        sign: +1, or -1 for models that rotate the other way.
        scale: factor that the model multiplies cos and sin by (YaRN, LongRoPE); the rotation here is pure.
    """

    frequencies: tuple[float, ...]
    layout: Layout = "half"
    start: int = 0
    sign: int = 1
    scale: float = 1.0

    def turn(self, positions: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> Turn:
        """Angles for positions or differences of positions.

        Args:
            positions: [S, T] or [T], integer, may be negative.
            dtype: of the angles before cos and sin; position times frequency in float32 is off by
                hundredths of a radian near one million.

        Returns:
            cos and sin as [S, T, R] float32 (S = 1 for one-dimensional positions).
        """
        rows = positions if positions.dim() == 2 else positions[None]
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=rows.device).to(dtype)
        angles = rows.to(dtype)[..., None] * (frequencies * self.sign)
        return Turn(
            angles.cos().float(),
            angles.sin().float(),
            start=self.start,
            interleaved=self.layout == "interleaved",
        )


def rotate(x: torch.Tensor, turn: Turn | None) -> torch.Tensor:
    """Rotate rows once, in float32, with one rounding.

    Args:
        x: [B, H, T, D], any float dtype; not modified.
        turn: angles with S = 1; None (a layer without positions) returns `x` itself.

    Returns:
        [B, H, T, D], dtype of `x`.
    """
    return x if turn is None else turn_query(x, turn, 1)[0]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the probe found out about one layer.

    Attributes:
        rotation: None in layers without positional encoding.
        window: keys this many positions back and further are not seen; None: all are.
    """

    rotation: Rotation | None = None
    window: int | None = None

    def score_factor(self, dtype: torch.dtype) -> float:
        """Mend of the score scale for models that multiply cos by a factor which `dtype` rounds.

        At position zero such a model scales queries and keys by the rounded factor; in its ordinary
        run the factor is applied before rounding.
        """
        if self.rotation is None or self.rotation.scale == 1.0:
            return 1.0
        exact = self.rotation.scale
        return (exact / torch.tensor(exact).to(dtype).item()) ** 2


def distinct(specs: Sequence[LayerSpec]) -> list[LayerSpec]:
    """The different kinds of layers, in order of first use."""
    return list(dict.fromkeys(specs))

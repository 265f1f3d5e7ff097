"""Rows in fewer bits, as they are stored and as attention may read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Form = Literal["fp8", "int8", "int4"]

GROUP = 32
"""Tokens of a group of keys, and most channels of a group of values."""

BITS = {"int8": 8, "int4": 4}


class OutOfRange(ValueError):
    """The rows are too large for a form's scales."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """One layer's keys, not rotated, and values in fewer bits.

    Keys have scales per channel, for all tokens (fp8) or for each group of 32 (int8 and int4); tokens that do
    not fill a group are kept as they are. Values have scales per token, for all channels (fp8) or for groups
    of at most 32. Integers are steps above a zero point; two of four bits share a byte, the lower one first.

    Attributes:
        form: which of them.
        keys: [K, n, D] float8_e4m3fn; or [K, n // 32 * 32, D] uint8, half as wide for int4.
        values: [K, n, Dv] float8_e4m3fn; or [K, n, Dv] uint8, half as wide for int4.
        key_scale: [K, 1, D] float32; or [K, n // 32, D] float16.
        value_scale: [K, n, 1] float32; or [K, n, groups of channels] float16.
        key_zero: like `key_scale`; None for fp8.
        value_zero: like `value_scale`; None for fp8.
        key_rest: [K, n % 32, D], in the rows' own type; None for fp8.

    Source: KIVI (Liu et al. 2024, arXiv:2402.02750, sec. 3) and KVQuant (Hooper et al. 2024,
    arXiv:2401.18079, sec. 3.2): before their rotation keys have their outliers in the same channels.
    """

    form: Form
    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    key_zero: torch.Tensor | None = None
    value_zero: torch.Tensor | None = None
    key_rest: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Tokens."""
        return self.values.shape[1]

    @property
    def key_size(self) -> int:
        """Channels of a key."""
        return self.key_scale.shape[-1]

    @property
    def value_size(self) -> int:
        """Channels of a value."""
        return self.values.shape[-1] * (2 if self.form == "int4" else 1)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that it consists of."""
        parts = (
            self.keys,
            self.values,
            self.key_scale,
            self.value_scale,
            self.key_zero,
            self.value_zero,
            self.key_rest,
        )
        return tuple(part for part in parts if part is not None)


def width(size: int) -> int:
    """Channels of a group of values: the largest divisor of the head's size up to 32."""
    return next(w for w in range(min(GROUP, size), 0, -1) if size % w == 0)

"""How rows are written: as they are, or in fewer bits.

A codec sees one layer at a time and knows nothing of files. Those that lose something take keys before their
rotation: outliers stay in the same channels then, and a channel's scale fits all tokens of a group (KIVI, Liu
et al. 2024, arXiv:2402.02750, sec. 3; KVQuant, Hooper et al. 2024, arXiv:2401.18079, sec. 3.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from kvrag.errors import ConfigError
from kvrag.rotary import Rotation
from kvrag.segments import LayerKV
from kvrag_kernels import Turn
from kvrag_kernels.quantise import BITS, GROUP, OutOfRange, Quantised, dequantise, quantise, width

Shape = tuple[int, int, int]
"""Heads, size of a key, size of a value: K, D, Dv."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a layer as it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """Writes a layer's rows as tensors and makes rows of them again."""

    name: str

    @abstractmethod
    def parts(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """The tensors of a layer, in the order in which `pack` gives them."""

    @abstractmethod
    def pack(self, layer: LayerKV, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """A layer's tensors.

        Args:
            layer: keys rotated at local positions 0..T-1.
            rotation: of the layer's keys; None in layers without positions.

        Raises:
            ConfigError: the rows are too large for it.
        """

    @abstractmethod
    def unpack(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, rotation: Rotation | None) -> LayerKV:
        """Rows of `dtype` from the tensors of `pack`, keys rotated again."""


class Raw(Codec):
    """Rows as they are: the only codec whose files are attended to in place."""

    name = "raw"

    def parts(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Keys [K, T, D] and values [K, T, Dv]."""
        heads, key_size, value_size = shape
        return (
            Part("keys", dtype, (heads, num_tokens, key_size)),
            Part("values", dtype, (heads, num_tokens, value_size)),
        )

    def pack(self, layer: LayerKV, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """The rows themselves."""
        return layer.keys, layer.values

    def unpack(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, rotation: Rotation | None) -> LayerKV:
        """The rows themselves."""
        keys, values = parts
        return LayerKV(keys, values)


class Fp8(Codec):
    """Eight-bit floats (e4m3), keys with a scale per channel and values with one per token."""

    name = "fp8"

    def parts(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Elements and scales of keys and values."""
        heads, key_size, value_size = shape
        return (
            Part("keys.scale", torch.float32, (heads, 1, key_size)),
            Part("values.scale", torch.float32, (heads, num_tokens, 1)),
            Part("keys", torch.float8_e4m3fn, (heads, num_tokens, key_size)),
            Part("values", torch.float8_e4m3fn, (heads, num_tokens, value_size)),
        )

    def pack(self, layer: LayerKV, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """Divide by the largest magnitude, so that the format's whole range is used."""
        packed = quantise(
            layer.keys, layer.values, "fp8", _turn(rotation, layer.num_tokens, layer.keys.device)
        )
        return packed.key_scale, packed.value_scale, packed.keys, packed.values

    def unpack(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, rotation: Rotation | None) -> LayerKV:
        """Multiply by the scales."""
        key_scale, value_scale, keys, values = parts
        packed = Quantised("fp8", keys, values, key_scale, value_scale)
        return LayerKV(*dequantise(packed, dtype, _turn(rotation, packed.num_rows, keys.device)))


class Integers(Codec):
    """Unsigned integers between the smallest and the largest element of a group (KIVI, sec. 3).

    A group of keys is 32 tokens of one channel; tokens that do not fill a group are kept as they are. A group
    of values is at most 32 channels of one token.

    Args:
        form: "int8" or "int4"; two numbers of four bits share a byte, so that sizes of heads have to be even.
    """

    def __init__(self, form: Literal["int8", "int4"]) -> None:
        self.name = form
        self._form, self._per_byte = form, 8 // BITS[form]

    def parts(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Rows that are kept, zero points and scales in float16, and integers."""
        heads, key_size, value_size = shape
        if key_size % self._per_byte or value_size % self._per_byte:
            raise ConfigError(
                f"{self.name} packs pairs of channels; heads of {key_size} and {value_size} do not fit"
            )
        groups, per_token = num_tokens // GROUP, value_size // width(value_size)
        key_scales, value_scales = (heads, groups, key_size), (heads, num_tokens, per_token)
        return (
            Part("keys.rest", dtype, (heads, num_tokens - groups * GROUP, key_size)),
            Part("keys.zero", torch.float16, key_scales),
            Part("keys.scale", torch.float16, key_scales),
            Part("values.zero", torch.float16, value_scales),
            Part("values.scale", torch.float16, value_scales),
            Part("keys", torch.uint8, (heads, groups * GROUP, key_size // self._per_byte)),
            Part("values", torch.uint8, (heads, num_tokens, value_size // self._per_byte)),
        )

    def pack(self, layer: LayerKV, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """Round to the nearest of 256 or 16 steps."""
        turn = _turn(rotation, layer.num_tokens, layer.keys.device)
        try:
            packed = quantise(layer.keys, layer.values, self._form, turn)
        except OutOfRange as error:
            raise ConfigError(f"{error}; take fp8 or raw") from error
        rest, key_zero, value_zero = packed.key_rest, packed.key_zero, packed.value_zero
        assert rest is not None
        assert key_zero is not None
        assert value_zero is not None
        return rest, key_zero, packed.key_scale, value_zero, packed.value_scale, packed.keys, packed.values

    def unpack(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, rotation: Rotation | None) -> LayerKV:
        """Zero point plus steps times scale."""
        rest, key_zero, key_scale, value_zero, value_scale, keys, values = parts
        packed = Quantised(self._form, keys, values, key_scale, value_scale, key_zero, value_zero, rest)
        return LayerKV(*dequantise(packed, dtype, _turn(rotation, packed.num_rows, keys.device)))


def _turn(rotation: Rotation | None, num_tokens: int, device: torch.device) -> Turn | None:
    """The rotation at local positions 0..T-1."""
    return rotation.turn(torch.arange(num_tokens, device=device)) if rotation is not None else None


CODECS: Mapping[str, Codec] = {
    codec.name: codec for codec in (Raw(), Fp8(), Integers("int8"), Integers("int4"))
}


def codec_named(name: str) -> Codec:
    """The codec of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CODECS:
        raise ConfigError(f"no codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]

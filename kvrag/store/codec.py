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

import torch

from kvrag.errors import ConfigError
from kvrag.rotary import Rotation, rotate
from kvrag.segments import LayerKV

_GROUP = 32

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
    _dtype = torch.float8_e4m3fn

    def parts(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Elements and scales of keys and values."""
        heads, key_size, value_size = shape
        return (
            Part("keys.scale", torch.float32, (heads, 1, key_size)),
            Part("values.scale", torch.float32, (heads, num_tokens, 1)),
            Part("keys", self._dtype, (heads, num_tokens, key_size)),
            Part("values", self._dtype, (heads, num_tokens, value_size)),
        )

    def pack(self, layer: LayerKV, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """Divide by the largest magnitude, so that the format's whole range is used."""
        keys, values = _unrotated(layer.keys, rotation), layer.values.float()
        key_scale, value_scale = self._scale(keys, 1), self._scale(values, 2)
        packed = ((keys / key_scale).to(self._dtype), (values / value_scale).to(self._dtype))
        return key_scale, value_scale, *packed

    def _scale(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        largest = rows.abs().amax(dim, keepdim=True)
        return torch.where(largest == 0, 1.0, largest / torch.finfo(self._dtype).max)

    def unpack(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, rotation: Rotation | None) -> LayerKV:
        """Multiply by the scales."""
        key_scale, value_scale, keys, values = parts
        return LayerKV(
            _rotated(keys.float() * key_scale, rotation).to(dtype), (values.float() * value_scale).to(dtype)
        )


class Integers(Codec):
    """Unsigned integers between the smallest and the largest element of a group (KIVI, sec. 3).

    A group of keys is 32 tokens of one channel; tokens that do not fill a group are kept as they are. A group
    of values is at most 32 channels of one token.

    Args:
        bits: 8 or 4; two numbers of four bits share a byte, so that sizes of heads have to be even.
    """

    def __init__(self, bits: int) -> None:
        self.name = f"int{bits}"
        self._bits, self._per_byte = bits, 8 // bits

    def parts(self, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Rows that are kept, zero points and scales in float16, and integers."""
        heads, key_size, value_size = shape
        if key_size % self._per_byte or value_size % self._per_byte:
            raise ConfigError(
                f"{self.name} packs pairs of channels; heads of {key_size} and {value_size} do not fit"
            )
        groups, per_token = num_tokens // _GROUP, value_size // _width(value_size)
        key_scales, value_scales = (heads, groups, key_size), (heads, num_tokens, per_token)
        return (
            Part("keys.rest", dtype, (heads, num_tokens - groups * _GROUP, key_size)),
            Part("keys.zero", torch.float16, key_scales),
            Part("keys.scale", torch.float16, key_scales),
            Part("values.zero", torch.float16, value_scales),
            Part("values.scale", torch.float16, value_scales),
            Part("keys", torch.uint8, (heads, groups * _GROUP, key_size // self._per_byte)),
            Part("values", torch.uint8, (heads, num_tokens, value_size // self._per_byte)),
        )

    def pack(self, layer: LayerKV, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """Round to the nearest of 256 or 16 steps."""
        keys, values = _unrotated(layer.keys, rotation), layer.values.float()
        heads, num_tokens, key_size = keys.shape
        full = num_tokens // _GROUP * _GROUP
        key_zero, key_scale, packed_keys = self._quantised(
            keys[:, :full].reshape(heads, -1, _GROUP, key_size), 2
        )
        value_zero, value_scale, packed_values = self._quantised(
            values.unflatten(-1, (-1, _width(values.shape[-1]))), -1
        )
        return (
            keys[:, full:].to(layer.keys.dtype),
            key_zero[:, :, 0],
            key_scale[:, :, 0],
            value_zero[..., 0],
            value_scale[..., 0],
            self._joined(packed_keys.reshape(heads, full, key_size)),
            self._joined(packed_values.reshape(values.shape)),
        )

    def _quantised(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zero points and scales, float16, size 1 along `dim`, and steps above the zero point, uint8.

        Raises:
            ConfigError: float16 does not reach as far as the rows do.
        """
        steps = 2**self._bits - 1
        if not x.numel():
            edge = x.narrow(dim, 0, 1).half()
            return edge, edge, x.to(torch.uint8)
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        zero = low.half()
        # The scale has to reach the largest element from the rounded zero point.
        scale = ((high - zero.float()) / steps).half()
        if not (zero.isfinite() & scale.isfinite()).all():
            largest = x.abs().max().item()
            raise ConfigError(f"{self.name} cannot hold rows of up to {largest:.3g}; take fp8 or raw")
        divisor = torch.where(scale == 0, 1.0, scale.float())
        return zero, scale, ((x - zero.float()) / divisor).round().clamp(0, steps).to(torch.uint8)

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._per_byte == 1 else x[..., ::2] | x[..., 1::2] << 4

    def _parted(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._per_byte == 1 else torch.stack((x & 15, x >> 4), dim=-1).flatten(-2)

    def unpack(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, rotation: Rotation | None) -> LayerKV:
        """Zero point plus steps times scale."""
        rest, key_zero, key_scale, value_zero, value_scale, packed_keys, packed_values = parts
        keys = self._parted(packed_keys).unflatten(1, (-1, _GROUP)).float()
        keys = keys.mul_(key_scale[:, :, None].float()).add_(key_zero[:, :, None].float()).flatten(1, 2)
        values = self._parted(packed_values).unflatten(-1, (value_scale.shape[-1], -1)).float()
        values = values.mul_(value_scale[..., None].float()).add_(value_zero[..., None].float()).flatten(-2)
        keys = torch.cat((keys, rest.float()), dim=1)
        return LayerKV(_rotated(keys, rotation).to(dtype), values.to(dtype))


def _width(size: int) -> int:
    """Channels of a group of values: the largest divisor of the head's size up to 32."""
    return next(width for width in range(min(_GROUP, size), 0, -1) if size % width == 0)


def _unrotated(keys: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """[K, T, D] float32, at position zero."""
    return _turned(keys.float(), rotation, -1)


def _rotated(keys: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """[K, T, D] float32, at local positions 0..T-1."""
    return _turned(keys, rotation, 1)


def _turned(keys: torch.Tensor, rotation: Rotation | None, sign: int) -> torch.Tensor:
    if rotation is None:
        return keys
    positions = sign * torch.arange(keys.shape[1], device=keys.device)
    return rotate(keys[None], rotation.turn(positions))[0]


CODECS: Mapping[str, Codec] = {codec.name: codec for codec in (Raw(), Fp8(), Integers(8), Integers(4))}


def codec_named(name: str) -> Codec:
    """The codec of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CODECS:
        raise ConfigError(f"no codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]

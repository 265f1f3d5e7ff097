"""Lossless compression of numbers: their bytes sorted by significance, then zstd.

Signs and exponents of a layer's elements are much alike, their last bits are noise. Number after number the
two alternate, and a compressor finds nothing; all first bytes, then all second ones, and what is alike lies
together (the byte shuffle of Blosc and HDF5; for weights ZipNN, Hershcovitch et al. 2024, arXiv:2411.05239).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvrag.errors import MissingExtra
from kvrag.store.codec import Part
from kvrag.store.damage import Damaged

MAX_RATIO = 64
"""A layer that grows by more is damage: caches shrink to two thirds, and no forgery shall fill the memory."""
_LEVEL = 1
_WORDS = {2: "<u2", 4: "<u4", 8: "<u8"}


def zstandard() -> Any:
    """The library.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import zstandard as library  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra("zstandard", "compress") from error
    return library


def compress(tensors: Sequence[memoryview], parts: Sequence[Part]) -> bytes:
    """One zstd frame of a layer's tensors.

    Args:
        tensors: the bytes of each.
        parts: what they are.
    """
    planes = b"".join(_apart(raw, part.dtype.itemsize) for raw, part in zip(tensors, parts, strict=True))
    compressed: bytes = zstandard().ZstdCompressor(level=_LEVEL, write_checksum=False).compress(planes)
    return compressed


def decompress(blob: Any, parts: Sequence[Part]) -> torch.Tensor:
    """The layer's bytes again, uint8 in memory of their own.

    Args:
        blob: what `compress` gave, as bytes or whatever lends its memory as such.
        parts: the tensors that it was made of; no more memory is taken than they need.

    Raises:
        Damaged: it is no frame of so many bytes.
        MissingExtra: the library is not installed.
    """
    library, size = zstandard(), sum(part.num_bytes for part in parts)
    try:
        # Asked first: decompress() trusts the frame's own word for how much memory it takes.
        if library.get_frame_parameters(blob).content_size != size or size > MAX_RATIO * len(blob):
            raise Damaged("a compressed layer is not of the size that its manifest says")
        planes = library.ZstdDecompressor().decompress(blob, allow_extra_data=False)
    except library.ZstdError as error:
        raise Damaged(f"a compressed layer cannot be read: {error}") from error
    out, at = np.empty(size, np.uint8), 0
    for part in parts:
        _together(
            np.frombuffer(planes, np.uint8, part.num_bytes, at),
            part.dtype.itemsize,
            out[at : at + part.num_bytes],
        )
        at += part.num_bytes
    return torch.from_numpy(out)


def _apart(raw: memoryview, width: int) -> bytes:
    """All lowest bytes, then all second ones, and so on."""
    return np.frombuffer(raw, np.uint8).reshape(-1, width).T.tobytes()


def _together(planes: np.ndarray[Any, Any], width: int, out: np.ndarray[Any, Any]) -> None:
    """Numbers from their bytes, least significant first."""
    if width == 1:
        out[:] = planes
        return
    # Whole words at once: writing every second byte takes several times as long.
    words, apart = out.view(_WORDS[width]), planes.reshape(width, -1)
    words[:] = apart[-1]
    for plane in apart[-2::-1]:
        words <<= 8
        words |= plane

"""The file of a saved conversation: safetensors with a checksum, encrypted or not (docs/sessions.md)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvrag.sessions.vault import Vault
from kvrag.store.damage import Damaged
from kvrag.store.sealing import OVERHEAD, Cipher

FORMAT, VERSION = "kvrag session", 1
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_CHECKSUM_BYTES = 16
_MAX_HEADER = 64 << 20
_PIECE_BYTES = 64 << 20  # so much is encrypted at a time, and held twice meanwhile

Tensors = dict[str, torch.Tensor]
Bytes = bytes | memoryview


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a file, before its bytes."""

    dtype: str
    shape: list[int]
    num_bytes: int


def encoded(tensors: Tensors, manifest: Mapping[str, Any], vault: Vault) -> Iterator[Bytes]:
    """A file: header, tensors, and a checksum over both, which is the last tensor.

    Args:
        tensors: by name.
        manifest: what else there is to know; JSON.
        vault: whose it is.
    """
    about = {"format": FORMAT, "version": str(VERSION), **vault.about(uuid.uuid4().hex)}
    told = json.dumps(manifest)
    named = [
        (name, _Entry(_CODES[t.dtype], list(t.shape), t.nbytes), _bytes(t)) for name, t in tensors.items()
    ]
    cipher = vault.sealing(about["id"]) if "id" in about else None
    if cipher is None:
        parts: Iterable[Bytes] = _container({**about, "manifest": told}, named)
    else:
        parts = _sealed(about, told.encode(), list(_container(None, named)), cipher)
    made = xxhash.xxh3_128()
    for part in parts:
        made.update(part)
        yield part
    yield made.digest()


def decoded(raw: bytes | bytearray, vault: Vault, path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What `encoded` was given, every byte of it proven.

    Raises:
        SessionSealed: another key opens it, or it is another tenant's.
        ValueError: it is no such file, or not whole. Also KeyError, TypeError.
    """
    view = memoryview(raw)
    if len(raw) < 8 + _CHECKSUM_BYTES:
        raise ValueError(f"it has {len(raw)} bytes")
    header, start = _header(view[:-_CHECKSUM_BYTES])
    made = xxhash.xxh3_128()
    made.update(view[:-_CHECKSUM_BYTES])
    if made.digest() != bytes(view[-_CHECKSUM_BYTES:]):
        raise ValueError("its checksum is another one")
    about = _checked(header)
    cipher = vault.cipher(about, path)
    if cipher is None:
        told, data = json.loads(about["manifest"]), view[start:-_CHECKSUM_BYTES]
        header.pop("seal")
    else:
        told, body = _opened(view[start:-_CHECKSUM_BYTES], json.loads(about["blobs"]), cipher)
        header, start = _header(body)
        data = body[start:]
    header.pop("__metadata__", None)
    return {name: _tensor(data, entry) for name, entry in header.items()}, told


def heading(path: Path) -> tuple[dict[str, Any], int]:
    """What a file says of itself in the clear, and where its tensors begin; nothing is proven.

    Raises:
        ValueError: it is no such file. Also KeyError, TypeError, OSError.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(size, _MAX_HEADER)))
    return _checked(header), 8 + size


def claimed(path: Path, vault: Vault) -> dict[str, Any]:
    """The manifest of a file; reads no rows, and proves nothing of one that is not encrypted.

    Raises:
        SessionSealed: another key opens it, or it is another tenant's.
        ValueError: it is no such file. Also KeyError, TypeError, OSError.
    """
    about, start = heading(path)
    cipher = vault.cipher(about, path)
    if cipher is None:
        told: dict[str, Any] = json.loads(about["manifest"])
        return told
    blobs = json.loads(about["blobs"])
    with path.open("rb") as stream:
        stream.seek(start)
        blob = stream.read(int(blobs[0]))
    told = json.loads(bytes(_open(blob, 0, len(blobs), cipher)))
    return told


def _checked(header: Mapping[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = header["__metadata__"]
    if about.get("format") != FORMAT or about.get("version") != str(VERSION):
        raise ValueError(f"it is {about.get('format')!r} in version {about.get('version')!r}")
    return about


def _header(view: memoryview) -> tuple[dict[str, Any], int]:
    """What stands in front, and where the tensors begin."""
    size = int.from_bytes(view[:8], "little")
    if size > min(_MAX_HEADER, len(view) - 8):
        raise ValueError("its header is longer than the file")
    header: dict[str, Any] = json.loads(bytes(view[8 : 8 + size]))
    return header, 8 + size


def _container(
    about: Mapping[str, str] | None, tensors: Sequence[tuple[str, _Entry, Bytes]]
) -> Iterator[Bytes]:
    """Length and JSON of a header, then the tensors' bytes; with `about`, a checksum is to follow.

    Args:
        about: what the file says of itself.
        tensors: name, form and bytes, in order.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": dict(about)}
    at = 0
    named = [(name, entry) for name, entry, _ in tensors]
    if about is not None:
        named.append(("seal", _Entry("U8", [_CHECKSUM_BYTES], _CHECKSUM_BYTES)))
    for name, entry in named:
        end = at + entry.num_bytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    yield len(text).to_bytes(8, "little")
    yield text
    yield from (data for _, _, data in tensors)


def _sealed(
    about: Mapping[str, str], manifest: bytes, body: Sequence[Bytes], cipher: Cipher
) -> Iterator[Bytes]:
    """A file of one tensor: the manifest, then the file that there would be, in encrypted pieces."""
    pieces = list(_pieces(body))
    sizes = [len(manifest) + OVERHEAD, *(sum(map(len, piece)) + OVERHEAD for piece in pieces)]
    told = {**about, "blobs": json.dumps(sizes)}
    yield from _container(told, [("sealed", _Entry("U8", [sum(sizes)], sum(sizes)), b"")])
    plain: list[list[Bytes]] = [[manifest], *pieces]
    for number, piece in enumerate(plain):
        yield memoryview(cipher.seal(piece, *_place(number, len(sizes))))


def _pieces(parts: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """The same bytes in pieces of a size that can be encrypted in one go."""
    piece: list[Bytes] = []
    size = 0
    for part in parts:
        left = memoryview(part)
        while left:
            taken = left[: _PIECE_BYTES - size]
            piece.append(taken)
            size, left = size + len(taken), left[len(taken) :]
            if size == _PIECE_BYTES:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece


def _opened(view: memoryview, sizes: Sequence[int], cipher: Cipher) -> tuple[dict[str, Any], memoryview]:
    """Manifest and file of what was sealed.

    Raises:
        ValueError: it is not as it was.
    """
    if min(sizes, default=0) < OVERHEAD or sum(sizes) != len(view):
        raise ValueError("its parts are of another size")
    whole, at, end = bytearray(len(view) - OVERHEAD * len(sizes)), 0, 0
    for number, size in enumerate(sizes):
        plain = _open(view[at : at + size], number, len(sizes), cipher)
        whole[end : end + len(plain)] = plain
        at, end = at + size, end + len(plain)
    first = sizes[0] - OVERHEAD
    told: dict[str, Any] = json.loads(bytes(whole[:first]))
    return told, memoryview(whole)[first:]


def _open(blob: Bytes, number: int, of: int, cipher: Cipher) -> memoryview:
    try:
        opened: memoryview = cipher.open(blob, *_place(number, of)).numpy().data
    except Damaged as damage:
        raise ValueError(str(damage)) from damage
    return opened


def _place(number: int, of: int) -> tuple[str, str]:
    """What a piece is bound to beside its file: no piece can stand for another, and none can be left out."""
    return f"piece {number}", f"of {of}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data if flat.numel() else memoryview(b"")


def _tensor(data: memoryview, told: Mapping[str, Any]) -> torch.Tensor:
    start, end = told["data_offsets"]
    dtype, shape = _DTYPES[told["dtype"]], [int(n) for n in told["shape"]]
    num = 1
    for n in shape:
        num *= n
    if not 0 <= start <= end <= len(data) or end - start != num * dtype.itemsize:
        raise ValueError("a tensor lies outside the file")
    if not num:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8).view(dtype).reshape(shape)

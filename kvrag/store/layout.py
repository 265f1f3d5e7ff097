"""The bytes of an entry: a safetensors file of rows and a manifest. Specified in docs/store-format.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvrag.errors import ConfigError
from kvrag.rotary import Rotation
from kvrag.segments import KV, LayerKV
from kvrag.store.codec import CODECS, Codec, Part, Shape
from kvrag.store.key import EntryKey, Fingerprint, token_bytes

ALIGNMENT = 64
_DTYPES = {
    "float64": ("F64", torch.float64),
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float8_e4m3fn": ("F8_E4M3", torch.float8_e4m3fn),
    "float8_e5m2": ("F8_E5M2", torch.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in _DTYPES.values()} | {torch.uint8: "U8"}
_SEAL = b',"manifest_checksum":"'
_SEAL_END = b'"}\n'
_SEAL_BYTES = len(_SEAL) + 32 + len(_SEAL_END)


class Damaged(Exception):
    """A file of the store is not what it has to be; the message says in what."""


@dataclass(frozen=True, slots=True)
class Checksums:
    """xxh3_128 in hex of the parts of the data file; together they cover every byte of it."""

    header: str
    tokens: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known about an entry without reading its rows.

    Attributes:
        fingerprint: fields of the key's fingerprint.
        num_tokens: T.
        layers: (K, D, Dv) of every layer.
        data_start: bytes of the data file before layer 0; a multiple of 64.
        file_size: bytes of the data file.
        checksums: of header, tokens and layers.
        created: seconds since 1970.
        cost_seconds: what reading the text took; 0 if unknown.
        expires: seconds since 1970 after which the entry is a miss; None: never.
    """

    fingerprint: dict[str, str | int]
    num_tokens: int
    layers: tuple[tuple[int, int, int], ...]
    data_start: int
    file_size: int
    checksums: Checksums
    created: float
    cost_seconds: float = 0.0
    expires: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the rows."""
        return _DTYPES[str(self.fingerprint["dtype"])][1]

    @property
    def codec(self) -> Codec:
        """How the rows are written."""
        return CODECS[str(self.fingerprint["codec"])]

    def parts(self, number: int) -> tuple[Part, ...]:
        """The tensors of one layer in the data file, in order."""
        return _parts(self.codec.name, self.layers[number], self.num_tokens, self.dtype)[0]

    def layer_spans(self) -> Iterator[tuple[int, int]]:
        """First byte and the one after the last of every layer in the data file."""
        start, codec, dtype = self.data_start, self.codec.name, self.dtype
        for shape in self.layers:
            end = start + _parts(codec, shape, self.num_tokens, dtype)[1]
            yield start, end
            start = end

    def row_bytes(self) -> list[int]:
        """Bytes of each layer's rows in memory."""
        size = self.num_tokens * self.dtype.itemsize
        return [heads * (key_size + value_size) * size for heads, key_size, value_size in self.layers]


@lru_cache(maxsize=1024)
def _parts(codec: str, shape: Shape, num_tokens: int, dtype: torch.dtype) -> tuple[tuple[Part, ...], int]:
    """The tensors of one layer, and their bytes together; asked for every layer of every load."""
    parts = CODECS[codec].parts(shape, num_tokens, dtype)
    return parts, sum(part.num_bytes for part in parts)


def is_storable(dtype: str) -> bool:
    """Whether rows of this element type have a name in the format."""
    return dtype in _DTYPES


def layer_parts(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    """The tensors of one layer as bytes; copied only if they are not contiguous in main memory."""
    flat = [t.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    return [t.numpy().data for t in flat]


def encode(fingerprint: Fingerprint, kv: KV, created: float) -> tuple[Manifest, list[bytes | memoryview]]:
    """Manifest and the data file's parts in order."""
    shapes = tuple((x.keys.shape[0], x.keys.shape[2], x.values.shape[2]) for x in kv.layers)
    codec = CODECS[fingerprint.codec]
    dtype = _DTYPES[fingerprint.dtype][1]
    header = _header(
        fingerprint.fields(), kv.num_tokens, [codec.parts(s, kv.num_tokens, dtype) for s in shapes]
    )
    rotations = rotations_of(fingerprint, len(kv.layers))
    layers = [
        layer_parts(codec.pack(layer, rotation)) for layer, rotation in zip(kv.layers, rotations, strict=True)
    ]
    tokens = token_bytes(kv.tokens)
    parts: list[bytes | memoryview] = [header, *(part for layer in layers for part in layer), tokens]
    checksums = Checksums(_checksum(header), _checksum(tokens), tuple(map(_checksum_parts, layers)))
    manifest = Manifest(
        fingerprint=fingerprint.fields(),
        num_tokens=kv.num_tokens,
        layers=shapes,
        data_start=len(header),
        file_size=sum(len(part) for part in parts),
        checksums=checksums,
        created=created,
    )
    return manifest, parts


def rotations_of(fingerprint: Fingerprint, num_layers: int) -> Sequence[Rotation | None]:
    """The rotation of every layer's keys.

    Raises:
        ConfigError: the codec needs them and the fingerprint does not have them.
    """
    if fingerprint.codec == "raw":
        return [None] * num_layers
    if len(fingerprint.rotations) != num_layers:
        raise ConfigError(
            f"codec {fingerprint.codec} keeps keys unrotated: the fingerprint has to have the rotations of "
            f"{num_layers} layers and has {len(fingerprint.rotations)}; take it from Model.fingerprint"
        )
    return fingerprint.rotations


def _header(fields: dict[str, str | int], num_tokens: int, layers: Sequence[Sequence[Part]]) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces so that the rows start aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "kvrag", **{k: str(v) for k, v in fields.items()}}}
    offset = 0

    def describe(name: str, code: str, shape: Sequence[int], size: int) -> None:
        nonlocal offset
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    for number, parts in enumerate(layers):
        for part in parts:
            describe(f"{number:03}.{part.name}", _CODES[part.dtype], part.shape, part.num_bytes)
    describe("tokens", "I32", [num_tokens], 4 * num_tokens)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def dump_manifest(manifest: Manifest) -> bytes:
    """One line of JSON whose last field seals all bytes before it."""
    body = json.dumps(asdict(manifest), separators=(",", ":")).encode()[:-1]
    return body + _SEAL + _checksum(body).encode() + _SEAL_END


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in these bytes.

    Raises:
        Damaged: not sealed by its own checksum, or not of this form.
    """
    body, seal = raw[:-_SEAL_BYTES], raw[-_SEAL_BYTES:]
    if seal != _SEAL + _checksum(body).encode() + _SEAL_END:
        raise Damaged("the manifest's own checksum does not match")
    try:
        fields = json.loads(raw)
        sums = fields["checksums"]
        manifest = Manifest(
            fingerprint=fields["fingerprint"],
            num_tokens=fields["num_tokens"],
            layers=tuple((k, d, v) for k, d, v in fields["layers"]),
            data_start=fields["data_start"],
            file_size=fields["file_size"],
            checksums=Checksums(sums["header"], sums["tokens"], tuple(sums["layers"])),
            created=fields["created"],
            cost_seconds=fields["cost_seconds"],
            expires=fields["expires"],
        )
        _check_sizes(manifest)
        _check_times(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"the manifest is sealed but not of this layout: {error!r}") from error
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    numbers = [manifest.num_tokens, manifest.data_start, *(n for layer in manifest.layers for n in layer)]
    if not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in numbers):
        raise Damaged("the manifest has sizes that no entry has")
    if manifest.data_start % ALIGNMENT or not is_storable(str(manifest.fingerprint["dtype"])):
        raise Damaged("the manifest has an alignment or an element type that no entry has")
    if manifest.fingerprint["codec"] not in CODECS:
        raise Damaged(f"the entry was written by an unknown codec, {manifest.fingerprint['codec']}")
    end = max((end for _, end in manifest.layer_spans()), default=manifest.data_start)
    if end + 4 * manifest.num_tokens != manifest.file_size:
        raise Damaged("the manifest's shapes and file size disagree")
    if len(manifest.checksums.layers) != len(manifest.layers):
        raise Damaged("the manifest lacks a layer's checksum")


def _check_times(manifest: Manifest) -> None:
    times = [manifest.created, manifest.cost_seconds, manifest.expires or 0.0]
    if not all(isinstance(t, (int, float)) and 0 <= t < 1 << 40 for t in times):
        raise Damaged("the manifest has times that no entry has")


def map_file(path: Path, manifest: Manifest) -> torch.Tensor:
    """All bytes of the data file, [file_size] uint8, mapped copy-on-write: writing never reaches the file.

    The mapping lives as long as any tensor that views it, and holds no file descriptor.

    Raises:
        Damaged: another size than the manifest says, or the file cannot be opened.
    """
    try:
        size = path.stat().st_size
        if size != manifest.file_size:
            raise Damaged(f"the data file has {size} bytes, its manifest says {manifest.file_size}")
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise Damaged(f"the data file cannot be read: {error}") from error


def verify(data: torch.Tensor, manifest: Manifest) -> None:
    """Compare every byte with the manifest's checksums.

    One thread: xxh3 reads 17 GB/s here, and two threads that fault pages of new mappings were slower.

    Raises:
        Damaged: a part differs; the message names it.
    """
    verify_frame(data, manifest)
    for number, span in enumerate(manifest.layer_spans()):
        verify_layer(data, manifest, number, span)


def verify_parts(parts: Sequence[bytes | memoryview], manifest: Manifest) -> None:
    """The same for a data file that is not one yet: its bytes, in pieces.

    Raises:
        Damaged: they differ.
    """
    data = torch.frombuffer(bytearray().join(parts) or bytearray(1), dtype=torch.uint8)
    if data.nbytes != manifest.file_size:
        raise Damaged(f"there are {data.nbytes} bytes, the manifest says {manifest.file_size}")
    verify(data, manifest)


def verify_frame(data: torch.Tensor, manifest: Manifest) -> None:
    """Compare the bytes around the rows, header and tokens, with their checksums; touches no others.

    Raises:
        Damaged: a part differs; the message names it.
    """
    if _checksum(data[: manifest.data_start].numpy()) != manifest.checksums.header:
        raise Damaged("the data file's header has changed")
    if _checksum(stored_tokens(data, manifest)) != manifest.checksums.tokens:
        raise Damaged("the tokens have changed")


def verify_layer(data: torch.Tensor, manifest: Manifest, number: int, span: tuple[int, int]) -> None:
    """Compare the bytes of one layer with their checksum; touches no others.

    Args:
        data: the mapped file.
        manifest: of the entry.
        number: of the layer.
        span: where it lies, from `Manifest.layer_spans`.

    Raises:
        Damaged: they differ.
    """
    start, end = span
    if _checksum(data[start:end].numpy()) != manifest.checksums.layers[number]:
        raise Damaged(f"the rows of layer {number} have changed")


def stored_tokens(data: torch.Tensor, manifest: Manifest) -> bytes:
    """The tokens' bytes, as `token_bytes` gives them."""
    return data[manifest.file_size - 4 * manifest.num_tokens :].numpy().tobytes()


def view_rows(data: torch.Tensor, manifest: Manifest, tokens: tuple[int, ...]) -> KV:
    """Raw keys and values as views of the mapped file: no byte of a row is copied."""
    count, shapes = manifest.num_tokens, manifest.layers
    flat = data[manifest.data_start : manifest.file_size - 4 * count].view(manifest.dtype)
    if len({n for _, *sizes in shapes for n in sizes}) == 1 and len(set(shapes)) == 1:
        # Nearly every model: all tensors at once, a fifth of the time of one view after another.
        heads, size, _ = shapes[0]
        rows = iter(flat.view(2 * len(shapes), heads, count, size).unbind())
        return KV(tokens, tuple(map(LayerKV, rows, rows)))
    layers, offset = [], flat.storage_offset()
    for heads, key_size, value_size in shapes:
        keys = flat.as_strided((heads, count, key_size), (count * key_size, key_size, 1), offset)
        offset += keys.numel()
        values = flat.as_strided((heads, count, value_size), (count * value_size, value_size, 1), offset)
        offset += values.numel()
        layers.append(LayerKV(keys, values))
    return KV(tokens, tuple(layers))


def reader(data: torch.Tensor, manifest: Manifest, key: EntryKey) -> Callable[[int], LayerKV]:
    """What gives the rows of a layer: views of the mapped file, or decoded in memory of their own.

    Raises:
        ConfigError: keys are to be rotated and the key's fingerprint does not say how.
    """
    if manifest.codec.name == "raw":
        return view_rows(data, manifest, key.tokens).layers.__getitem__
    rotations, spans = rotations_of(key.fingerprint, len(manifest.layers)), list(manifest.layer_spans())

    def decoded(number: int) -> LayerKV:
        at, tensors = spans[number][0], []
        for part in manifest.parts(number):
            # A copy: parts lie where the ones before end, which may be no multiple of their elements' size.
            raw = data[at : at + part.num_bytes].clone()
            tensors.append(raw.view(part.dtype).view(part.shape))
            at += part.num_bytes
        return manifest.codec.unpack(tensors, manifest.dtype, rotations[number])

    return decoded


def _checksum(part: Any) -> str:
    """xxh3_128 of bytes, or of whatever lends its memory as bytes."""
    return xxhash.xxh3_128_hexdigest(part)


def _checksum_parts(parts: list[memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

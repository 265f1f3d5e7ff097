"""What is known about an entry without reading its rows. Specified in docs/store-format.md."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvrag.store.codec import CODECS, Codec, Part, Shape
from kvrag.store.damage import Damaged
from kvrag.store.filters import CHAINS, Filters, sizes_of
from kvrag.store.sealing import CIPHER, Cipher

ALIGNMENT = 64
DTYPES = {
    "float64": ("F64", torch.float64),
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float8_e4m3fn": ("F8_E4M3", torch.float8_e4m3fn),
    "float8_e5m2": ("F8_E5M2", torch.float8_e5m2),
}
CODES = {dtype: code for code, dtype in DTYPES.values()} | {torch.uint8: "U8"}
_SEAL = b',"manifest_checksum":"'
_SEAL_END = b'"}\n'
_SEAL_BYTES = len(_SEAL) + 32 + len(_SEAL_END)
_MAX_MANIFEST = 16 << 20  # a thousand layers take a tenth of a megabyte


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
        id: of the entry.
        fingerprint: fields of the key's fingerprint; if encrypted only tenant and layout, until `reveal`.
        num_tokens: T.
        layers: (K, D, Dv) of every layer.
        data_start: bytes of the data file before layer 0; a multiple of 64.
        file_size: bytes of the data file.
        checksums: of header, tokens and layers, as they are in the file.
        created: seconds since 1970.
        cost_seconds: what reading the text took; 0 if unknown.
        expires: seconds since 1970 after which the entry is a miss; None: never.
        filters: what was done to the bytes of layers and tokens, in order: "zstd", "aes256gcm".
        sizes: bytes of every layer in the data file.
        key_id: names the key of an encrypted entry; "" of others.
        private: of an encrypted entry the whole fingerprint, encrypted, in base64; "" of others.
    """

    id: str
    fingerprint: dict[str, str | int]
    num_tokens: int
    layers: tuple[tuple[int, int, int], ...]
    data_start: int
    file_size: int
    checksums: Checksums
    created: float
    cost_seconds: float = 0.0
    expires: float | None = None
    filters: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    key_id: str = ""
    private: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the rows."""
        return DTYPES[str(self.fingerprint["dtype"])][1]

    @property
    def codec(self) -> Codec:
        """How the rows are written."""
        return CODECS[str(self.fingerprint["codec"])]

    def parts(self, number: int) -> tuple[Part, ...]:
        """The tensors of one layer in the data file, in order."""
        return _parts(self.codec.name, self.layers[number], self.num_tokens, self.dtype)[0]

    def layer_spans(self) -> Iterator[tuple[int, int]]:
        """First byte and the one after the last of every layer in the data file."""
        start = self.data_start
        for size in self.sizes:
            yield start, start + size
            start += size

    @property
    def tokens_start(self) -> int:
        """The first byte behind the layers in the data file."""
        return self.data_start + sum(self.sizes)

    def layer_bytes(self) -> list[int]:
        """Bytes of each layer as the codec writes it."""
        codec, dtype = self.codec.name, self.dtype
        return [_parts(codec, shape, self.num_tokens, dtype)[1] for shape in self.layers]

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
    return dtype in DTYPES


def dump_manifest(manifest: Manifest) -> bytes:
    """One line of JSON whose last field seals all bytes before it."""
    body = _body(manifest)
    return body + _SEAL + checksum(body).encode() + _SEAL_END


def _body(manifest: Manifest) -> bytes:
    """The same without that field; of an encrypted entry without what is private."""
    fields = asdict(manifest)
    if CIPHER in manifest.filters:
        fields["fingerprint"] = {name: manifest.fingerprint[name] for name in ("tenant", "layout")}
    return json.dumps(fields, separators=(",", ":")).encode()[:-1]


def sealed(manifest: Manifest, cipher: Cipher) -> Manifest:
    """With its private fields encrypted, and the others bound to them: none changes without the key."""
    secret = json.dumps(manifest.fingerprint, separators=(",", ":")).encode()
    blob = cipher.seal([secret], "manifest", _body(replace(manifest, private="")).decode())
    return replace(manifest, private=base64.b64encode(blob).decode())


def reveal(manifest: Manifest, filters: Filters) -> tuple[Manifest, Cipher | None]:
    """The manifest with its private fields, proven, and what opens the entry's blobs.

    Raises:
        ConfigError: encrypted, and no key was given.
        Damaged: it is not as the store writes them, was changed, or is another entry's.
    """
    cipher = _cipher(manifest, filters)
    if cipher is None:
        return manifest, None
    try:
        blob = base64.b64decode(manifest.private, validate=True)
        secret = cipher.open(blob, "manifest", _body(replace(manifest, private="")).decode())
        revealed = replace(manifest, fingerprint=json.loads(secret.numpy().tobytes()))
    except ValueError as error:
        raise Damaged(f"the manifest's private part cannot be read: {error}") from error
    _check_rows(revealed)
    return revealed, cipher


def resealed(manifest: Manifest, filters: Filters) -> Manifest:
    """A revealed manifest, changed since, with its private part bound to what it says now."""
    cipher = _cipher(manifest, filters)
    return manifest if cipher is None else sealed(manifest, cipher)


def _cipher(manifest: Manifest, filters: Filters) -> Cipher | None:
    tenant = str(manifest.fingerprint.get("tenant"))
    return filters.cipher(manifest.filters, manifest.key_id, tenant, manifest.id)


def read_manifest(path: Path | str) -> Manifest:
    """The manifest in this file.

    Raises:
        Damaged: it cannot be read; see `parse_manifest`.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_MANIFEST:
                raise Damaged("the manifest is longer than any entry's")
            raw = file.read()
    except OSError as error:
        raise Damaged(f"the manifest cannot be read: {error}") from error
    return parse_manifest(raw)


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in these bytes; of an encrypted entry what can be read without the key.

    Raises:
        Damaged: not sealed by its own checksum, or not of this form.
    """
    body, seal = raw[:-_SEAL_BYTES], raw[-_SEAL_BYTES:]
    if seal != _SEAL + checksum(body).encode() + _SEAL_END:
        raise Damaged("the manifest's own checksum does not match")
    try:
        fields = json.loads(raw)
        sums = fields["checksums"]
        manifest = Manifest(
            id=fields["id"],
            fingerprint=fields["fingerprint"],
            num_tokens=fields["num_tokens"],
            layers=tuple((k, d, v) for k, d, v in fields["layers"]),
            data_start=fields["data_start"],
            file_size=fields["file_size"],
            checksums=Checksums(sums["header"], sums["tokens"], tuple(sums["layers"])),
            created=fields["created"],
            cost_seconds=fields["cost_seconds"],
            expires=fields["expires"],
            filters=tuple(fields["filters"]),
            sizes=tuple(fields["sizes"]),
            key_id=str(fields["key_id"]),
            private=str(fields["private"]),
        )
        _check_sizes(manifest)
        _check_times(manifest)
        if CIPHER not in manifest.filters:
            _check_rows(manifest)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"the manifest is sealed but not of this layout: {error!r}") from error
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    """Refuse what cannot be true of any data file."""
    numbers = [manifest.num_tokens, manifest.data_start, manifest.file_size, *manifest.sizes]
    numbers += [n for layer in manifest.layers for n in layer]
    if not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in numbers):
        raise Damaged("the manifest has sizes that no entry has")
    if manifest.filters not in CHAINS:
        raise Damaged(f"the entry was written by an unknown filter: {manifest.filters}")
    if CIPHER in manifest.filters and set(manifest.fingerprint) != {"tenant", "layout"}:
        raise Damaged("the manifest of an encrypted entry shows something else than tenant and layout")
    if not isinstance(manifest.id, str) or manifest.data_start % ALIGNMENT:
        raise Damaged("the manifest has a name or an alignment that no entry has")
    if not len(manifest.checksums.layers) == len(manifest.sizes) == len(manifest.layers):
        raise Damaged("the manifest lacks a layer's checksum or size")
    if manifest.tokens_start > manifest.file_size:
        raise Damaged("the manifest's layers are larger than the file")


def _check_times(manifest: Manifest) -> None:
    times = [manifest.created, manifest.cost_seconds, manifest.expires or 0.0]
    if not all(isinstance(t, (int, float)) and 0 <= t < 1 << 40 for t in times):
        raise Damaged("the manifest has times that no entry has")


def _check_rows(manifest: Manifest) -> None:
    """Refuse what does not fit together, once the fingerprint is known."""
    if not is_storable(str(manifest.fingerprint["dtype"])):
        raise Damaged("the manifest has an element type that no entry has")
    if manifest.fingerprint["codec"] not in CODECS:
        raise Damaged(f"the entry was written by an unknown codec, {manifest.fingerprint['codec']}")
    if any(n < 1 for layer in manifest.layers for n in layer):
        raise Damaged("the manifest has a layer without rows")
    allowed = sizes_of(manifest.filters, manifest.layer_bytes(), 4 * manifest.num_tokens)
    found = (*manifest.sizes, manifest.file_size - manifest.tokens_start)
    if not all(least <= size <= most for size, (least, most) in zip(found, allowed, strict=True)):
        raise Damaged("the manifest's shapes and file size disagree")


def checksum(part: Any) -> str:
    """xxh3_128 of bytes, or of whatever lends its memory as bytes."""
    return xxhash.xxh3_128_hexdigest(part)

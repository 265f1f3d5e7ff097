"""The bytes of an entry: a data file of rows and a manifest. Specified in docs/store-format.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvrag.errors import ConfigError
from kvrag.rotary import Rotation
from kvrag.segments import KV, LayerKV
from kvrag.store import advice
from kvrag.store.codec import CODECS, Part
from kvrag.store.damage import Damaged
from kvrag.store.filters import PLAIN, ZSTD, Filters, place, undo
from kvrag.store.key import KEYED, EntryKey, Fingerprint, token_bytes
from kvrag.store.manifest import (
    ALIGNMENT,
    CODES,
    DTYPES,
    Checksums,
    Manifest,
    checksum,
    dump_manifest,
    is_storable,
    parse_manifest,
    read_manifest,
    resealed,
    reveal,
    sealed,
)
from kvrag.store.planes import zstandard
from kvrag.store.sealing import CIPHER, Cipher
from kvrag.store.together import THREADS, together

__all__ = [
    "ALIGNMENT",
    "SEALED_HEADER",
    "Checksums",
    "Damaged",
    "Manifest",
    "dump_manifest",
    "encode",
    "is_storable",
    "map_file",
    "parse_manifest",
    "plain_header",
    "prove_name",
    "read_manifest",
    "reader",
    "resealed",
    "reveal",
    "rotations_of",
    "stored_tokens",
    "verify",
    "verify_frame",
    "verify_layer",
    "verify_parts",
    "view_rows",
]

_RUN_BYTES = 2 << 20  # less of a file is not worth a thread
SEALED_HEADER = b"kvrag sealed entry, layout 2\n".ljust(ALIGNMENT, b"\0")


def layer_parts(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    """The tensors of one layer as bytes; copied only if they are not contiguous in main memory."""
    flat = [t.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    return [t.numpy().data for t in flat]


def encode(
    key: EntryKey,
    kv: KV,
    created: float,
    *,
    cost_seconds: float = 0.0,
    expires: float | None = None,
    filters: Filters = PLAIN,
) -> tuple[Manifest, list[bytes | memoryview]]:
    """Manifest and the data file's parts in order.

    Args:
        key: of the entry.
        kv: its rows.
        created: seconds since 1970.
        cost_seconds: what reading the text took; 0 if unknown.
        expires: seconds since 1970 after which it is a miss; None: never.
        filters: what is done to the bytes.

    Raises:
        ConfigError: the codec, or the cipher, cannot take these rows.
    """
    fingerprint, num_tokens = key.fingerprint, kv.num_tokens
    shapes = tuple((x.keys.shape[0], x.keys.shape[2], x.values.shape[2]) for x in kv.layers)
    codec, dtype = CODECS[fingerprint.codec], DTYPES[fingerprint.dtype][1]
    parts = [codec.parts(shape, num_tokens, dtype) for shape in shapes]
    rotations = rotations_of(fingerprint, len(kv.layers))
    layers: list[Sequence[bytes | memoryview]]
    plain = [
        layer_parts(codec.pack(layer, rotation)) for layer, rotation in zip(kv.layers, rotations, strict=True)
    ]
    frames = filters.compressed(plain, parts)
    layers = [[frame] for frame in frames] if frames else list(plain)
    tokens: bytes | memoryview = token_bytes(kv.tokens)
    cipher = filters.sealing(fingerprint.tenant, key.id)
    chain = ((ZSTD,) if frames else ()) + ((CIPHER,) if cipher else ())
    if cipher:
        layers = [[memoryview(cipher.seal(x, *place(number, chain)))] for number, x in enumerate(layers)]
        tokens = memoryview(cipher.seal([tokens], "tokens"))
        header = SEALED_HEADER
    else:
        header = plain_header(
            fingerprint.fields(), num_tokens, parts, [len(f) for f in frames] if frames else None
        )
    sizes = tuple(sum(map(len, layer)) for layer in layers)
    manifest = Manifest(
        id=key.id,
        fingerprint=fingerprint.fields(),
        num_tokens=num_tokens,
        layers=shapes,
        data_start=len(header),
        file_size=len(header) + sum(sizes) + len(tokens),
        checksums=Checksums(checksum(header), checksum(tokens), tuple(map(_checksum_parts, layers))),
        created=created,
        cost_seconds=cost_seconds,
        expires=expires,
        filters=chain,
        sizes=sizes,
    )
    if cipher and filters.key:
        manifest = sealed(replace(manifest, key_id=filters.key.id), cipher)
    return manifest, [header, *(part for layer in layers for part in layer), tokens]


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


def plain_header(
    fields: dict[str, str | int],
    num_tokens: int,
    layers: Sequence[Sequence[Part]],
    compressed: Sequence[int] | None = None,
) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces so that the rows start aligned.

    Args:
        fields: of the fingerprint.
        num_tokens: T.
        layers: the codec's tensors of each.
        compressed: bytes of each layer's frame, which stands for its tensors then.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "kvrag", **{k: str(v) for k, v in fields.items()}}}
    offset = 0

    def describe(name: str, code: str, shape: Sequence[int], size: int) -> None:
        nonlocal offset
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    for number, size in enumerate(compressed or ()):
        describe(f"{number:03}.{ZSTD}", "U8", [size], size)
    for number, parts in enumerate(() if compressed else layers):
        for part in parts:
            describe(f"{number:03}.{part.name}", CODES[part.dtype], part.shape, part.num_bytes)
    describe("tokens", "I32", [num_tokens], 4 * num_tokens)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


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

    Large files by several threads, each a run of layers: while one waits for the disk, the others do not.

    Raises:
        Damaged: a part differs; the message names it.
    """
    spans = list(manifest.layer_spans())
    runs = max(1, min(THREADS, len(spans), manifest.file_size // _RUN_BYTES))
    bounds = [len(spans) * i // runs for i in range(runs + 1)]

    def verify_run(first: int, last: int) -> None:
        if spans:
            advice.read_now(data, spans[first][0], spans[last - 1][1])
        if first == 0:
            verify_frame(data, manifest)
        for number in range(first, last):
            verify_layer(data, manifest, number, spans[number])

    together([partial(verify_run, first, last) for first, last in pairwise(bounds)])


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
    if checksum(data[: manifest.data_start].numpy()) != manifest.checksums.header:
        raise Damaged("the data file's header has changed")
    if checksum(data[manifest.tokens_start :].numpy()) != manifest.checksums.tokens:
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
    if checksum(data[start:end].numpy()) != manifest.checksums.layers[number]:
        raise Damaged(f"the rows of layer {number} have changed")


def stored_tokens(data: torch.Tensor, manifest: Manifest, cipher: Cipher | None = None) -> bytes:
    """The tokens' bytes, as `token_bytes` gives them.

    Raises:
        Damaged: they cannot be decrypted.
    """
    blob = data[manifest.tokens_start :]
    return (blob if cipher is None else cipher.open(blob.numpy().data, "tokens")).numpy().tobytes()


def prove_name(data: torch.Tensor, manifest: Manifest, key_id: str, filters: Filters = PLAIN) -> None:
    """Prove that a verified entry belongs to its name, as far as this store can read it.

    Names of tenants cannot be computed here, nor names of encrypted entries without the key: they are what
    the manifest says, which `get` compares with the key that it looks for.

    Raises:
        Damaged: it belongs to another.
    """
    if manifest.id != key_id:
        raise Damaged("the entry belongs to another name")
    if CIPHER in manifest.filters and not filters.is_encrypting:
        return
    manifest, cipher = reveal(manifest, filters)
    raw = stored_tokens(data, manifest, cipher)
    tokens = tuple(int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4))
    try:
        fingerprint = Fingerprint(**manifest.fingerprint)  # type: ignore[arg-type]  # str | int from JSON
    except TypeError as error:
        raise Damaged(f"the manifest has other fingerprint fields: {error}") from error
    if not str(fingerprint.tenant).startswith(KEYED) and EntryKey(fingerprint, tokens).id != key_id:
        raise Damaged("the entry's content belongs to another name")


def view_rows(data: torch.Tensor, manifest: Manifest, tokens: tuple[int, ...]) -> KV:
    """Raw keys and values as views of the mapped file: no byte of a row is copied."""
    count, shapes = manifest.num_tokens, manifest.layers
    flat = data[manifest.data_start : manifest.tokens_start].view(manifest.dtype)
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


def reader(
    data: torch.Tensor, manifest: Manifest, key: EntryKey, cipher: Cipher | None = None
) -> Callable[[int], LayerKV]:
    """What gives the rows of a layer: views of the mapped file, or decoded in memory of their own.

    What it gives may raise `Damaged`: an encrypted or compressed layer that cannot be undone.

    Raises:
        ConfigError: keys are to be rotated and the key's fingerprint does not say how.
        MissingExtra: the entry is compressed, and the library for it is not installed.
    """
    if manifest.codec.name == "raw" and not manifest.filters:
        return view_rows(data, manifest, key.tokens).layers.__getitem__
    if ZSTD in manifest.filters:
        zstandard()  # to be missed now, not when a layer is touched
    rotations, spans = rotations_of(key.fingerprint, len(manifest.layers)), list(manifest.layer_spans())

    def decoded(number: int) -> LayerKV:
        parts, (start, end) = manifest.parts(number), spans[number]
        flat = undo(manifest.filters, cipher, number, data[start:end], parts)
        at, tensors = 0, []
        for part in parts:
            raw = flat[at : at + part.num_bytes]
            # Parts lie where the ones before end, which may be no multiple of their elements' size.
            raw = raw.clone() if raw.storage_offset() % part.dtype.itemsize else raw
            tensors.append(raw.view(part.dtype).view(part.shape))
            at += part.num_bytes
        return manifest.codec.unpack(tensors, manifest.dtype, rotations[number])

    return decoded


def _checksum_parts(parts: Sequence[bytes | memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

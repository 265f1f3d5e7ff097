"""An entry under another key, or under none: its blobs opened and sealed anew, its rows as they were.

Nothing is decoded, decompressed or rounded on the way: an entry that is sealed and opened again is the same
bytes as before, manifest and data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvrag.store import layout
from kvrag.store.filters import ZSTD, Filters, place
from kvrag.store.layout import Checksums, Damaged, Manifest
from kvrag.store.manifest import checksum, reveal, sealed
from kvrag.store.sealing import CIPHER, Cipher

Parts = list[bytes | memoryview]


def recast(data: torch.Tensor, manifest: Manifest, before: Filters, after: Filters) -> tuple[Manifest, Parts]:
    """An entry as a store with another key, or without one, would have it: manifest and the data's parts.

    Args:
        data: the data file, [file_size] uint8.
        manifest: of the entry, as it was read.
        before: with the key that it has; without one for an entry that is not encrypted.
        after: with the key that it is to have; without one for none.

    Raises:
        ConfigError: the entry is encrypted, and `before` has no key.
        Damaged: a byte differs from what the manifest says, or cannot be decrypted.
    """
    layout.verify(data, manifest)
    revealed, old = reveal(manifest, before)
    new = after.sealing(str(manifest.fingerprint["tenant"]), manifest.id)
    rest = tuple(name for name in manifest.filters if name != CIPHER)
    chain = (*rest, CIPHER) if new else rest
    blobs = _blobs(data, manifest, old, new, chain)
    *layers, tokens = map(checksum, blobs)
    sizes = tuple(map(len, blobs[:-1]))
    header = layout.SEALED_HEADER if new else _header(revealed, sizes)
    manifest = replace(
        revealed,
        data_start=len(header),
        file_size=len(header) + sum(map(len, blobs)),
        checksums=Checksums(checksum(header), tokens, tuple(layers)),
        filters=chain,
        sizes=sizes,
        key_id=after.key.id if after.key else "",
        private="",
    )
    return sealed(manifest, new) if new else manifest, [header, *blobs]


def _blobs(
    data: torch.Tensor, manifest: Manifest, old: Cipher | None, new: Cipher | None, chain: Sequence[str]
) -> list[memoryview]:
    """Every layer, and then the tokens, as they are to lie in the file."""
    spans = [*manifest.layer_spans(), (manifest.tokens_start, manifest.file_size)]
    count = len(manifest.layers)
    blobs = []
    for number, (start, end) in enumerate(spans):
        blob = data[start:end].numpy().data
        if old is not None:
            where = place(number, manifest.filters) if number < count else ("tokens",)
            blob = old.open(blob, *where).numpy().data
        if new is not None:
            where = place(number, chain) if number < count else ("tokens",)
            blob = memoryview(new.seal([blob], *where))
        blobs.append(blob)
    return blobs


def _header(revealed: Manifest, sizes: Sequence[int]) -> bytes:
    """The header of a data file that is not encrypted.

    Raises:
        Damaged: the manifest says things that no entry has.
    """
    try:
        parts = [revealed.parts(number) for number in range(len(revealed.layers))]
        frames = sizes if ZSTD in revealed.filters else None
        return layout.plain_header(revealed.fingerprint, revealed.num_tokens, parts, frames)
    except (LookupError, ValueError) as error:
        raise Damaged(f"the manifest's fingerprint is none: {error!r}") from error

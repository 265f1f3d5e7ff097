"""Names of entries: everything that decides a document's keys and values, and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kvrag.errors import ConfigError
from kvrag.rotary import Rotation

LAYOUT_VERSION = 2
KEYED = "keyed:"
"""How labels of tenants begin whose names are digests with a key."""


def tagged_digest(fields: dict[str, str | int | bytes], key: bytes = b"") -> str:
    """256-bit BLAKE2b over named fields, in hex.

    Every name and value is preceded by its length, so no two different sets of fields have one encoding.

    Args:
        fields: values by name.
        key: up to 64 bytes without which nobody can compute the digest (RFC 7693, sec. 2.9).
    """
    h = hashlib.blake2b(digest_size=32, key=key)
    for name in sorted(fields):
        value = fields[name]
        raw = value if isinstance(value, bytes) else str(value).encode()
        for part in (name.encode(), raw):
            h.update(len(part).to_bytes(8, "little"))
            h.update(part)
    return h.hexdigest()


def token_bytes(tokens: tuple[int, ...]) -> bytes:
    """Tokens as little-endian int32, for hashing and comparing."""
    return np.asarray(tokens, dtype="<i4").tobytes()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What an entry depends on besides its text; entries of different fingerprints never meet.

    Attributes:
        model: digest of weights and configuration.
        tokenizer: digest of the tokenizer's files.
        rope: digest of every layer's rotation and window.
        dtype: element type of keys and values, such as "float32".
        prefix: digest of the tokens that the documents are encoded behind.
        codec: how rows are stored, by name (`kvrag.store.codec`); "raw" as they are.
        tenant: namespace; entries of one tenant are misses for all others. Made by `Tenant.label`.
        layout: version of the file layout.
        rotations: of every layer's keys, for codecs that keep them unrotated; no part of a name: `rope` is.
        tenant_key: `Tenant.key`, which names are keyed with; never written.
    """

    model: str
    tokenizer: str
    rope: str
    dtype: str
    prefix: str
    codec: str = "raw"
    tenant: str = ""
    layout: int = LAYOUT_VERSION
    rotations: tuple[Rotation | None, ...] = field(default=(), repr=False, compare=False)
    tenant_key: bytes = field(default=b"", repr=False, compare=False)

    def fields(self) -> dict[str, str | int]:
        """The fields by name, for manifests."""
        # Not asdict: it copies recursively, and this is read on every load.
        return {name: getattr(self, name) for name in self.__slots__ if name not in _UNNAMED}


_UNNAMED = ("rotations", "tenant_key")


@dataclass(frozen=True)
class EntryKey:
    """One text under one fingerprint."""

    fingerprint: Fingerprint
    tokens: tuple[int, ...] = field(repr=False)

    @cached_property
    def id(self) -> str:
        """64 hex digits, the entry's name in every store: a digest, with the tenant's key if there is one.

        Raises:
            ConfigError: the tenant has a secret, and it is not here.
        """
        key = self.fingerprint.tenant_key
        if not key and self.fingerprint.tenant.startswith(KEYED):
            raise ConfigError(
                "this tenant's entries are named with its secret; give tenant=Tenant(name, secret)"
            )
        return tagged_digest({**self.fingerprint.fields(), "tokens": token_bytes(self.tokens)}, key)

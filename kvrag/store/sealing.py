"""Encryption at rest: AES-256-GCM for every blob, under keys that are derived from one master key.

    master key --HKDF--> tenant's key --HKDF--> entry's key --AES-256-GCM--> layers, tokens, private fields

A key of its own for every entry keeps the number of random nonces under one key far below the 2^32 that GCM
allows (NIST SP 800-38D, sec. 8.3), however many entries there are. What a blob is bound to (entry, place,
filters) is authenticated with it, so that no blob can stand in for another.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch

from kvrag.errors import ConfigError, MissingExtra
from kvrag.keys import KEY_BYTES
from kvrag.store.damage import Damaged
from kvrag.store.key import LAYOUT_VERSION

CIPHER = "aes256gcm"
OVERHEAD = 28
"""Bytes by which a blob grows: a nonce of 12 before it, a tag of 16 behind."""
_NONCE, _TAG = 12, 16
_MAX_BYTES = (1 << 31) - 1  # what one call of the library takes


class MasterKey:
    """What all keys of a store are derived from (HKDF-SHA256, RFC 5869).

    Args:
        raw: 32 random bytes, kept away from the data; `kvrag.keys.write_key` makes them.
        version: of what is encrypted; keys that are derived for another one have nothing to do with it.

    Raises:
        ConfigError: not 32 bytes.
        MissingExtra: `cryptography` is not installed.
    """

    def __init__(self, raw: bytes, version: int = LAYOUT_VERSION) -> None:
        if len(raw) != KEY_BYTES:
            raise ConfigError(
                f"the key has {len(raw)} bytes; expected {KEY_BYTES} of kvrag.keys.write_key(path)"
            )
        self._raw, self._version = raw, version
        self.id = self._derived(raw, b"id").hex()[:32]
        """Names the key and gives nothing of it away."""
        self._tenant_key = lru_cache(maxsize=256)(
            lambda tenant: self._derived(raw, b"tenant", tenant.encode())
        )

    def of_version(self, version: int) -> MasterKey:
        """The same key for what has another version."""
        return self if version == self._version else MasterKey(self._raw, version)

    def is_called(self, key_id: str) -> bool:
        """Whether the id is this key's."""
        return hmac.compare_digest(self.id.encode(), key_id.encode())

    def cipher(self, tenant: str, entry_id: str) -> Cipher:
        """What seals and opens the blobs of one entry."""
        key = self._derived(self._tenant_key(tenant), b"entry", entry_id.encode())
        return Cipher(key, entry_id, self._version)

    def _derived(self, key: bytes, purpose: bytes, name: bytes = b"") -> bytes:
        hashes, hkdf = _library("hazmat.primitives.hashes"), _library("hazmat.primitives.kdf.hkdf")
        info = b"kvrag %d %b %b" % (self._version, purpose, name)
        derived: bytes = hkdf.HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(key)
        return derived


class Cipher:
    """AES-256-GCM under the key of one entry."""

    def __init__(self, key: bytes, entry_id: str, version: int = LAYOUT_VERSION) -> None:
        self._aead = _library("hazmat.primitives.ciphers.aead").AESGCM(key)
        self._entry_id, self._version = entry_id, version

    def seal(self, parts: Sequence[bytes | memoryview], *bound_to: str) -> bytearray:
        """Nonce, ciphertext and tag.

        Args:
            parts: what to encrypt, one behind the other.
            bound_to: what `open` has to be told as well, the place first.

        Raises:
            ConfigError: too much for one blob.
        """
        plain = b"".join(parts)
        if len(plain) > _MAX_BYTES - OVERHEAD:
            raise ConfigError(
                f"a layer of {len(plain)} bytes cannot be encrypted, {_MAX_BYTES - OVERHEAD} is the most; "
                "cut the text"
            )
        blob = bytearray(len(plain) + OVERHEAD)
        blob[:_NONCE] = nonce = os.urandom(_NONCE)
        self._aead.encrypt_into(nonce, plain, self._bound(bound_to), memoryview(blob)[_NONCE:])
        return blob

    def open(self, blob: memoryview | bytes | bytearray, *bound_to: str) -> torch.Tensor:
        """What was sealed, uint8 in memory of its own.

        Raises:
            Damaged: a bit of it is not as it was, or it was sealed for another place, entry, tenant or key.
        """
        raw = memoryview(blob)
        if len(raw) < OVERHEAD:
            raise Damaged(f"the {bound_to[0]} is cut off")
        plain = np.empty(len(raw) - OVERHEAD, np.uint8)
        try:
            self._aead.decrypt_into(bytes(raw[:_NONCE]), raw[_NONCE:], self._bound(bound_to), plain.data)
        except _library("exceptions").InvalidTag as error:
            raise Damaged(
                f"the {bound_to[0]} cannot be decrypted: it was changed, or is another's"
            ) from error
        return torch.from_numpy(plain)

    def _bound(self, bound_to: Sequence[str]) -> bytes:
        """Each preceded by its length: no two lists have one encoding."""
        words = [part.encode() for part in ("kvrag", str(self._version), self._entry_id, *bound_to)]
        return b"".join(len(word).to_bytes(8, "little") + word for word in words)


def _library(module: str) -> Any:
    try:
        return import_module(f"cryptography.{module}")
    except ImportError as error:
        raise MissingExtra("cryptography", "encrypt") from error

"""Tenants: name spaces whose entries nobody else can find, name or recognise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from kvrag.errors import ConfigError
from kvrag.store.key import KEYED

_MIN_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class Tenant:
    """One of those who share a store, and know nothing of each other's texts.

    The names of a tenant's entries are digests keyed with its secret. Whoever lacks the secret can neither
    compute the name of a text, so as to see whether it is there, nor see that two tenants have the same text.

    Attributes:
        name: what people call it; never written anywhere.
        secret: at least 16 bytes that only this tenant's processes know; `kvrag.keys.write_key` makes 32.
    """

    name: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what would protect nothing.

        Raises:
            ConfigError: no name, or a secret that can be guessed.
        """
        if not self.name:
            raise ConfigError("a tenant needs a name")
        if len(self.secret) < _MIN_SECRET_BYTES:
            raise ConfigError(
                f"the secret of tenant {self.name!r} has {len(self.secret)} bytes; expected "
                f"{_MIN_SECRET_BYTES} or more random ones: kvrag.keys.write_key(path) makes them"
            )

    @property
    def label(self) -> str:
        """What stands for the tenant in fingerprints and manifests."""
        return KEYED + self.digest

    @property
    def digest(self) -> str:
        """32 hex digits that stand for the tenant in names; they say nothing without the secret."""
        return self._derived(b"kvrag label").hex()[:32]

    @property
    def key(self) -> bytes:
        """What the names of its entries are keyed with, 32 bytes; no two tenants have the same."""
        return self._derived(b"kvrag names")

    def _derived(self, purpose: bytes) -> bytes:
        key = hashlib.blake2b(self.secret).digest()  # secrets of any length
        return hashlib.blake2b(self.name.encode(), key=key, person=purpose, digest_size=32).digest()

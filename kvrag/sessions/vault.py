"""Where conversations are kept: under which names, whose they are, and what encrypts their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvrag.caches import Caches
from kvrag.errors import SessionSealed
from kvrag.store.sealing import CIPHER, Cipher, MasterKey
from kvrag.store.tenants import Tenant
from kvrag.stores import key_of

SUFFIX = ".session"


@dataclass(frozen=True, slots=True)
class Vault:
    """What the files of one tenant's conversations have in common.

    Attributes:
        key: what they are encrypted with; None: they are not.
        label: what stands for the tenant; "" for nobody in particular.
        secret: what their names are keyed with: without it nobody can tell which ids there are.
    """

    key: MasterKey | None = None
    label: str = ""
    secret: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, key: MasterKey | None, tenant: Tenant | None) -> Vault:
        """A tenant's."""
        return cls(key) if tenant is None else cls(key, tenant.label, tenant.key)

    def path(self, folder: Path, name: str) -> Path:
        """Where a folder has the session of an id, which may be any text."""
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=20, key=self.secret)
        return folder / f"{digest.hexdigest()}{SUFFIX}"

    def lock(self, folder: Path) -> Path:
        """What a process holds that has all of the tenant's sessions in a folder."""
        digest = blake2b(self.label.encode(), digest_size=8).hexdigest() if self.label else ""
        return folder / f"sessions{digest and '-'}{digest}.lock"

    def about(self, file_id: str) -> dict[str, str]:
        """What a file says of itself in the clear.

        Args:
            file_id: random, another one for every file: nonces never meet.
        """
        told = {"tenant": self.label}
        return told if self.key is None else {**told, "cipher": CIPHER, "key_id": self.key.id, "id": file_id}

    def cipher(self, about: Mapping[str, Any], path: Path) -> Cipher | None:
        """What opens a file, by what it says of itself; None where it is not encrypted.

        Raises:
            SessionSealed: it is not one of these.
            KeyError: it says too little.
        """
        if about.get("tenant", "") != self.label:
            raise SessionSealed(f"the session at {path} is another tenant's; open it with tenant=...")
        if "cipher" not in about:
            if self.key is not None:
                raise SessionSealed(
                    f"the session at {path} is not encrypted, and everything here is to be; encrypt it with "
                    "kvrag.sessions.rekey.rekey_sessions(folder, None, key), or remove it"
                )
            return None
        if self.key is None:
            raise SessionSealed(
                f"the session at {path} is encrypted; open it with the key that it was saved with "
                "(that of the engine's store, KVRAG_STORE_KEY)"
            )
        if about["cipher"] != CIPHER or not self.key.is_called(about["key_id"]):
            raise SessionSealed(
                f"the session at {path} is encrypted with the key {about['key_id'][:8]}, "
                f"given was {self.key.id[:8]}"
            )
        return self.sealing(str(about["id"]))

    def sealing(self, file_id: str) -> Cipher | None:
        """What seals a file; None where nothing is encrypted."""
        return None if self.key is None else self.key.cipher(self.label, f"session {file_id}")


PLAIN = Vault()


def vault_of(caches: Caches) -> Vault:
    """That of an engine: encrypted as its store is.

    Raises:
        ConfigError: the store is encrypted, and its key is not here.
    """
    return Vault.of(key_of(caches.store), caches.tenant)

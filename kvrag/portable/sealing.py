"""What protects an exported file: AES-256-GCM under a key of the person's own, member by member.

A sealed file is the same tar as a plain one. Its head says which key it needs, and has the settings sealed;
each part of the documents is sealed; caches are sealed as an encrypted store has them; and the digest of the
list of members is sealed, too, so that without the key no member can be left out, added, or taken from
another export. Names of caches, sizes and the number of members can be seen without the key, and so can the
signature, which needs none to be verified.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from typing import Any

from kvrag.store.damage import Damaged
from kvrag.store.sealing import CIPHER, OVERHEAD, MasterKey

__all__ = ["OVERHEAD", "Seal"]

# No tenant of a store has this label and no entry a name of this length, so no key is used for two purposes.
_PURPOSE = "kvrag export"
_FILE_BYTES = 16
_FILE = re.compile(r"[0-9a-f]{32}")


class Seal:
    """Seals and opens the members of one file.

    Args:
        key: 32 bytes, `kvrag.keys.write_key` makes them.
        file: 32 hex digits of the file; None: a new file, with random ones.

    Raises:
        ConfigError: no key.
        MissingExtra: cryptography is not installed.
    """

    def __init__(self, key: bytes, file: str | None = None) -> None:
        self.raw = key
        self.master = MasterKey(key)
        self._file = os.urandom(_FILE_BYTES).hex() if file is None else file
        self._cipher = self.master.cipher(_PURPOSE, self._file)

    def seal(self, raw: bytes, name: str) -> bytes:
        """What a member of this name holds."""
        return bytes(self._cipher.seal([raw], name))

    def open(self, raw: bytes, name: str) -> bytes:
        """What was sealed.

        Raises:
            Damaged: it was changed, or is of another member, file or key.
        """
        return self._cipher.open(raw, name).numpy().tobytes()

    def head(self, public: dict[str, Any], private: dict[str, Any]) -> dict[str, Any]:
        """The head of a sealed file: what everybody may read, which key it needs, and the rest sealed."""
        blob = self.seal(json.dumps(private, ensure_ascii=False).encode(), "head")
        says = {"cipher": CIPHER, "key_id": self.master.id, "file": self._file}
        return {**public, "sealed": says, "private": base64.b64encode(blob).decode()}

    @classmethod
    def of(cls, head: dict[str, Any], key: bytes) -> Seal | None:
        """What opens the file with this head; None: the key is not the one that it needs.

        Raises:
            ValueError, KeyError, TypeError: the head is not of this form.
        """
        says = head["sealed"]
        if says["cipher"] != CIPHER or _FILE.fullmatch(says["file"]) is None:
            raise ValueError("sealed")
        seal = cls(key, says["file"])
        return seal if seal.master.is_called(str(says["key_id"])) else None

    def private(self, head: dict[str, Any]) -> dict[str, Any]:
        """The sealed part of a head.

        Raises:
            Damaged: it was changed, or is of another file.
        """
        try:
            found = json.loads(self.open(base64.b64decode(head["private"], validate=True), "head"))
        except (KeyError, TypeError, ValueError, RecursionError, binascii.Error) as error:
            raise Damaged(f"the private part of its head cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise Damaged("the private part of its head is none")
        return found


def needed(head: dict[str, Any]) -> str:
    """The first digits of the name of the key that a file needs, for people."""
    says = head.get("sealed")
    return str(says.get("key_id"))[:8] if isinstance(says, dict) else "none"

"""What an archive's records say, encrypted: chats are kept beside an encrypted store, not beside its key."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from kvrag.errors import ConfigError
from kvrag.index import Metadata
from kvrag.store.damage import Damaged
from kvrag.store.sealing import Cipher, MasterKey

KEY_ID, TENANT = "sealed", "tenant"
_SESSION = "session"
_PRIVATE = (_SESSION, "origin", "role", "context", "tokens")


class RecordSeal:
    """Seals records of an archive and opens them; without a key it leaves them as they are.

    Text, tokens, roles and the ids of chats are encrypted, under a key of its own for every record. Places
    in the chat, a digest of its id and the vector stay: Chroma searches by them.

    Attributes:
        key: of the store that the archive belongs to; None: records are as they are.
        label: of the tenant; "" for nobody in particular.
    """

    def __init__(self, key: MasterKey | None = None, label: str = "") -> None:
        """Seal one tenant's records."""
        self.key, self.label = key, label

    def shut(
        self, record_id: str, text: str, metadata: Metadata, *, digest: str
    ) -> tuple[str, dict[str, Any]]:
        """A record as Chroma gets it.

        Args:
            record_id: of the record; the text is bound to it.
            text: what the span says.
            metadata: see `Archived.metadata`.
            digest: stands for the id of its chat.
        """
        if self.key is None:
            return text, dict(metadata)
        private = json.dumps({"text": text, **{name: metadata[name] for name in _PRIVATE}}).encode()
        blob = self._cipher(self.key, record_id).seal([private], "record")
        clear = {name: value for name, value in metadata.items() if name not in _PRIVATE}
        named = {_SESSION: digest, KEY_ID: self.key.id, TENANT: self.label}
        return base64.b64encode(blob).decode(), {**clear, **named}

    def open(self, record_id: str, text: str, metadata: Metadata) -> tuple[str, Metadata]:
        """What was shut.

        Raises:
            Damaged: it was changed, or is another record's.
            ConfigError: another key opens it.
        """
        self.check(metadata)
        if self.key is None:
            return text, metadata
        try:
            blob = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise Damaged(f"the record is not as it was written: {error}") from error
        opened = self._cipher(self.key, record_id).open(blob, "record")
        private: dict[str, Any] = json.loads(opened.numpy().tobytes())
        return str(private.pop("text")), {**metadata, **private}

    def session(self, session: str, digest: str) -> str:
        """What a chat's records have as its id."""
        return session if self.key is None else digest

    def is_foreign(self, metadata: Metadata) -> bool:
        """Whether it is a sealed record of another tenant."""
        return KEY_ID in metadata and label_of(metadata) != self.label

    def check(self, metadata: Metadata) -> None:
        """Refuse a record that was written with another key, or with one where none is here.

        Raises:
            ConfigError: says what is different.
        """
        key_id = str(metadata.get(KEY_ID) or "")
        if self.key is None:
            if key_id:
                raise ConfigError(
                    "the archive is encrypted; open it with its key (that of the engine's store, "
                    "KVRAG_STORE_KEY)"
                )
        elif not key_id:
            raise ConfigError(
                "the archive is not encrypted, and everything here is to be; encrypt it with "
                "kvrag.archive.rekey.rekey_archive(path, None, key), or choose another collection"
            )
        elif not self.key.is_called(key_id):
            raise ConfigError(
                f"the archive is encrypted with the key {key_id[:8]}, given was {self.key.id[:8]}"
            )

    def _cipher(self, key: MasterKey, record_id: str) -> Cipher:
        return key.cipher(self.label, f"archived {record_id}")


def label_of(metadata: Mapping[str, Any]) -> str:
    """The tenant of a sealed record."""
    return str(metadata.get(TENANT) or "")

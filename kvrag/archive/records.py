"""Archived spans as records of a Chroma collection, and the names of their entries."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvrag.archive.span import Mark, Span
from kvrag.errors import InputError
from kvrag.index import Metadata
from kvrag.items import KEY_FIELD
from kvrag.store.key import EntryKey, Fingerprint, tagged_digest, token_bytes


@dataclass(frozen=True, slots=True)
class Archived:
    """A span of a chat that the archive has.

    Attributes:
        session: the chat that it belongs to.
        origin: the chat in which it was read: another one if this is a copy of that.
        at: where it begins, and what stood before it.
        role: who says its first token.
        text: what it says.
        tokens: all of them.
        similarity: to what was searched for, see `kvrag.chroma_rows.Hit`.
    """

    session: str
    origin: str
    at: Mark
    role: str
    text: str
    tokens: tuple[int, ...]
    similarity: float = 0.0

    @classmethod
    def of(cls, session: str, span: Span) -> Archived:
        """A span that was read in a chat."""
        return cls(session, session, span.at, span.role, span.text, span.tokens)

    @classmethod
    def read(cls, text: str, metadata: Metadata, similarity: float = 0.0) -> Archived:
        """A record of the collection.

        Raises:
            InputError: nothing that an archive has written.
        """
        try:
            raw = base64.b85decode(str(metadata["tokens"]))
            at = Mark(int(metadata["start"]), int(metadata["turn"]), str(metadata["context"]))
            session, origin, role = (str(metadata[name]) for name in ("session", "origin", "role"))
            tokens = tuple(np.frombuffer(raw, "<i4").tolist())
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"a record that is no archived span: {error}") from error
        return cls(session, origin, at, role, text, tokens, similarity)

    @property
    def start(self) -> int:
        """Tokens of the chat before it."""
        return self.at.position

    @property
    def end(self) -> int:
        """Tokens of the chat up to its end."""
        return self.start + len(self.tokens)

    def metadata(self, key_id: str) -> dict[str, Any]:
        """The fields of its record.

        Args:
            key_id: of its entry.
        """
        return {
            KEY_FIELD: key_id,
            "session": self.session,
            "origin": self.origin,
            "turn": self.at.turn,
            "role": self.role,
            "start": self.start,
            "end": self.end,
            "context": self.at.context,
            "tokens": base64.b85encode(token_bytes(self.tokens)).decode(),
        }

    def moved(self, session: str) -> Archived:
        """The same span in a copy of the chat."""
        return replace(self, session=session)


class Names:
    """How one archive's records and entries are called.

    An entry's name depends on the chat, the place in it, everything before that place and the collection,
    beside what a document's depends on; so no document, no other chat and no other course of the same chat
    can ever be handed its rows.
    """

    def __init__(self, fingerprint: Fingerprint, collection_id: str) -> None:
        """Name things.

        Args:
            fingerprint: of the model, codec and tenant; what stands before a text is not looked at.
            collection_id: of the archive's collection.
        """
        self._fingerprint, self._collection = fingerprint, collection_id

    def key(self, span: Archived) -> EntryKey:
        """The name of a span's entry."""
        fields: Mapping[str, str | int | bytes] = {
            "archive": self._collection,
            "session": span.origin,
            "start": span.start,
            "context": span.at.context,
        }
        place = tagged_digest(dict(fields), self._fingerprint.tenant_key)
        return EntryKey(replace(self._fingerprint, prefix=place), span.tokens)

    def record(self, session: str, start: int) -> str:
        """The id of the record of the span that begins there; ids of one chat are in its spans' order."""
        return f"{self.chat(session)}-{start:012d}"

    def chat(self, session: str) -> str:
        """What ids of a chat's records begin with.

        Raises:
            InputError: a session's id that is empty or cannot be written.
        """
        try:
            raw = session.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the session's id {session!r} cannot be kept: {error}") from error
        if not raw:
            raise InputError("a session needs an id")
        return tagged_digest({"chat": raw}, self._fingerprint.tenant_key)[:24]

    def start(self, record_id: str) -> int:
        """Where the span of a record begins."""
        return int(record_id.rpartition("-")[2])
